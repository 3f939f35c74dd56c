"""From an HTTP request to tokens and back."""
