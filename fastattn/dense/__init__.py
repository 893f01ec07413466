"""Dense (flash-style) attention. Read api.py, then op.py, then one kernel."""
