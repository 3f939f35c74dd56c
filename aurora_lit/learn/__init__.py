"""Nothing is here but sub-packages."""
