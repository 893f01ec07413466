"""Modules with the interface of other attention packages: code written for those changes one import."""
