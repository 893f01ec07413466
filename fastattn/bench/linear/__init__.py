"""Measuring linear attention: the cases, what is set beside them, and the truth that they are held to."""
