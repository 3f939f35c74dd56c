"""arctic-inference's suffix cache as a proposer, in its own environment; prints JSON for benchmarks/memory_replay.

    python -m benchmarks.memory_replay.arctic --answers FILE... --out FILE

The cache holds a tree of the running request (prompt and answer) and a tree of all answers, the running one included;
the better-scored proposal of the two is taken. It is called as vLLM calls it: the newest tokens are added, then the
last `depth` tokens are the context, as int32 arrays. `max_spec_tokens` is always given, since the cache's own default
for it cannot be used (it reads an attribute that does not exist).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from arctic_inference.suffix_decoding import SuffixDecodingCache

from benchmarks.memory_replay.replay import Proposer, read_answers, replay_all


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a cache; the defaults are the cache's own, and so are the words."""

    max_tree_depth: int = 64
    max_cached_requests: int = -1
    max_spec_tokens: int = 64
    max_spec_factor: float = 1.0
    min_token_prob: float = 0.1
    use_tree_spec: bool = False


ARMS = {
    "arctic": Settings(),
    "arctic, as in vLLM": Settings(max_tree_depth=24, max_cached_requests=10_000, max_spec_tokens=24),
    "arctic, 15": Settings(max_spec_tokens=15),
    "arctic, tree of 15": Settings(max_spec_tokens=15, use_tree_spec=True),
    **{
        f"arctic, tree of 15, factor 4, from {least:g}": Settings(
            max_spec_tokens=15, use_tree_spec=True, max_spec_factor=4.0, min_token_prob=least
        )
        for least in (0.5, 0.25, 0.1)
    },
}
"""What is compared: the cache's defaults, vLLM's, at most as many proposals as ours, and the latter with a higher limit
of proposals for each matched token and several smallest probabilities, to compare at equal costs."""


class Arctic:
    """A cache for all requests."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cache = SuffixDecodingCache(settings.max_tree_depth, settings.max_cached_requests)
        self._request = -1
        self._tokens = np.zeros(0, np.int32)
        self._length = 0

    def begin(self, prompt: list[int], *, domain: str, sampled: bool) -> None:
        """Build the request's tree from its prompt."""
        del domain, sampled  # one tree for all
        self._request += 1
        self._tokens = np.zeros(len(prompt) + 4096, np.int32)
        self._tokens[: len(prompt)] = prompt
        self._length = len(prompt)
        self._cache.start_request(self._request, self._tokens[: self._length])

    def propose(self) -> tuple[list[int], list[int]]:
        """What follows the best match."""
        settings = self._settings
        context = self._tokens[max(0, self._length - settings.max_tree_depth) : self._length]
        draft = self._cache.speculate(
            self._request,
            context,
            max_spec_tokens=settings.max_spec_tokens,
            max_spec_factor=settings.max_spec_factor,
            min_token_prob=settings.min_token_prob,
            use_tree_spec=settings.use_tree_spec,
        )
        return draft.token_ids, draft.parents

    def accept(self, tokens: list[int], accepted: int, *, ended: bool) -> None:
        """Add committed tokens to both trees."""
        del accepted, ended
        end = self._length + len(tokens)
        self._tokens[self._length : end] = tokens
        self._cache.add_active_response(self._request, self._tokens[self._length : end])
        self._length = end

    def finish(self) -> None:
        """Drop the request's tree."""
        self._cache.stop_request(self._request)


def main() -> None:
    """Replay with every arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", nargs="+", type=Path, required=True)
    parser.add_argument("--shared", action="store_true", help="one cache for all domains, whose requests take turns")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    def maker(settings: Settings) -> Callable[[], Proposer]:
        return lambda: Arctic(settings)

    arms = {name: maker(settings) for name, settings in ARMS.items()}
    files = [read_answers(path) for path in arguments.answers]
    replayed = [asdict(each) for each in replay_all(arms, files, shared=arguments.shared)]
    arguments.out.write_text(json.dumps(replayed), encoding="utf-8")


if __name__ == "__main__":
    main()
