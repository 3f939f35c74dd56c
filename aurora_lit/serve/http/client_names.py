"""Who a client is, as traces say it: a name that tells clients apart and nothing about them.

A client is what the request's `user` says, as OpenAI's API means it (the end user, named by the front end); without
one, the address that the request came from. The API key is the same for all, so it tells nobody apart. Names are hashed
with a key that lives as long as the server's process: recorded traces cannot be led back to users.
"""

from __future__ import annotations

import hashlib
import secrets


class ClientNames:
    """One server's names.

    >>> names = ClientNames()
    >>> names.of(user="ann", address="10.0.0.7") == names.of(user="ann", address="10.0.0.8")
    True
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)

    def of(self, *, user: str | None, address: str | None) -> str:
        """16 hexadecimal digits; "" when nothing is known of the client."""
        if user:
            known = f"user {user}"
        elif address:
            known = f"address {address}"
        else:
            return ""
        # A lone surrogate is no character, but JSON can carry it.
        return hashlib.blake2b(known.encode(errors="surrogatepass"), key=self._key, digest_size=8).hexdigest()
