"""Routes into libraries that call attention by an interface of their own. Each is opt-in and reversible."""
