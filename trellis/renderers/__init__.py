"""Representation and cameras in, images out."""
