"""What a round computes, and what came of it: rows of query positions, decided before the target's pass.

    plan = RoundPlan([DecodingRow(...)], [PromptRow(...)], expected_s=0.004)    # serve/engine/engine.py: plan
    columns = runner.run(plan)                                                 # run
    outcome = judge(row, own_tokens)                                           # judge, then commit

A *row* is one sequence's part of a pass. A decoding row has the last committed token in column 0 and its proposals, a
chain or a tree, in the columns after it. A prompt row is a chunk of a prompt. Rows of both kinds share one pass.

Left out: who proposes (serve/speculation/propose.py), and which token the target chooses at a column
(modules/sampling/choice.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aurora_lit.kernels.suffix_index import is_remembered
from aurora_lit.modules.sampling.tree import accepted_path, common_prefix_length, first_choices
from aurora_lit.request import PLANS, Source
from aurora_lit.serve.engine.sequence import RunningSequence

SIBLING_TOKENS = 3
"""Most other likely tokens that are considered beside each token of a weighed chain."""


@dataclass(frozen=True, kw_only=True)
class SpeculationLimits:
    """The most that may be proposed for a sequence in a round."""

    draft_tokens: int
    """Longest chain; 0: there is no draft."""
    copied_tokens: int
    """0: nothing is copied."""
    sibling_tokens: int = 0
    """Beside each token of a chain; 0: chains are not weighed."""
    adaptive: bool = True
    """False: always the most."""

    @property
    def weighed_tokens(self) -> int:
        """Most tokens of a weighed chain and beside it."""
        return weighed_tokens(self.draft_tokens, self.sibling_tokens)


def weighed_tokens(draft_tokens: int, sibling_tokens: int) -> int:
    """Most tokens of a sequence that are proposed of a weighed chain; 0 without siblings, when nothing is weighed."""
    return 2 * draft_tokens if sibling_tokens else 0


class CopiedNode(NamedTuple):
    """A proposed token that has occurred after the same tokens before."""

    column: int
    parent: int
    """The column that it follows."""
    table: int
    cell: int
    """What is known about it; see CopyReliability in kernels/copy_rates.py."""


class WeighedChain(NamedTuple):
    """The first choices of a draft, those included that were not worth proposing."""

    tokens: list[int]
    shares: list[float]
    """The draft's probability of each after the one before it, with the noise of a sampled sequence."""

    def tested_by(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Of how many of them it is known whether they were right if these tokens came, and how many were."""
        right = common_prefix_length(self.tokens, tokens)
        return min(right + 1, len(self.tokens), len(tokens)), right


def source_of_copies(cells: Iterable[int]) -> Source:
    """That of a proposal of copies alone, by their cells."""
    return Source.MEMORY if any(map(is_remembered, cells)) else Source.NGRAM


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The tokens that are proposed for one sequence in a round."""

    tokens: list[int]
    parents: list[int] | None = None
    """Of a tree: the column that each token follows (modules/sampling/tree.py). None: a chain."""
    source: Source = Source.TARGET
    """Where they come from: DRAFT also with copies beside the draft's, MEMORY also with some from within the request.
    TARGET: nothing is proposed."""
    num_drafted: int = 0
    """The first so many tokens are the draft's; the others were copied."""
    copies: tuple[CopiedNode, ...] = ()
    """What is known about the copied tokens, and about those of the draft's that could have been copied too."""
    weighed: WeighedChain | None = None
    """What the draft's tokens were chosen from by their worth; None: all that it drafted are proposed."""

    @property
    def remembered(self) -> list[int]:
        """Columns of the tokens that the traffic memory alone proposed."""
        return [n.column for n in self.copies if n.column > self.num_drafted and is_remembered(n.cell)]

    def sources_of(self, columns: Sequence[int]) -> tuple[Source, ...]:
        """Where each proposed token comes from, by its column."""
        remembered, rest = self.remembered, Source.GRAMMAR if self.source is Source.GRAMMAR else Source.NGRAM
        return tuple(
            Source.DRAFT if column <= self.num_drafted else Source.MEMORY if column in remembered else rest
            for column in columns
        )

    @property
    def plan(self) -> str:
        """Which of request.PLANS a round counts as that proposes this alone."""
        if not self.tokens:
            return "plain"
        if self.source is Source.DRAFT:
            return "chain" if self.parents is None else "tree"
        return self.source.label

    @property
    def first_choices(self) -> list[int]:
        """Columns of the chain of first choices: all of a chain, one path of a tree. Of the draft's, if it drafted."""
        count = self.num_drafted or len(self.tokens)
        return list(range(1, count + 1)) if self.parents is None else first_choices(self.parents[:count])

    def keeping(self, columns: Sequence[int]) -> Proposal:
        """Only the tokens at some columns, ascending, whose parents are among them; column 0 is the first."""
        if len(columns) == 1:
            return NO_PROPOSAL
        now_at = {column: index for index, column in enumerate(columns)}
        parents = None if self.parents is None else [now_at[self.parents[column - 1]] for column in columns[1:]]
        copies = tuple(
            node._replace(column=now_at[node.column], parent=now_at[node.parent])
            for node in self.copies
            if node.column in now_at
        )
        num_drafted = sum(0 < column <= self.num_drafted for column in columns)
        source = self.source
        if source is Source.DRAFT and not num_drafted:
            source = source_of_copies(node.cell for node in copies)
        return replace(
            self,
            tokens=[self.tokens[column - 1] for column in columns[1:]],
            parents=None if parents == list(range(len(columns) - 1)) else parents,
            source=source,
            num_drafted=num_drafted,
            copies=copies,
        )


NO_PROPOSAL = Proposal(tokens=[])
"""A sequence decodes one token in this round."""


class Uncut(NamedTuple):
    """A proposal before the tokens were cut that the sequence's grammar forbids."""

    proposal: Proposal
    columns: Sequence[int]
    """Those that were kept, column 0 first."""


@dataclass(frozen=True, slots=True)
class DecodingRow:
    """A sequence that decodes: its last committed token and what is proposed after it."""

    sequence: RunningSequence
    root: int
    """The last committed token."""
    proposal: Proposal
    allowed: NDArray[np.uint8] | None = None
    """For each column the tokens that the sequence's grammar allows after it, a bit for each; None: all."""
    uncut: Uncut | None = None
    """None: the proposal is as it was made."""

    @property
    def start(self) -> int:
        """Position of column 0."""
        return self.sequence.length - 1

    @property
    def tokens(self) -> list[int]:
        """The token of every column."""
        return [self.root, *self.proposal.tokens]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A chunk of a sequence's prompt."""

    sequence: RunningSequence
    start: int
    """Position of its first token."""
    tokens: list[int]


@dataclass(slots=True)
class ProposedRound:
    """What is proposed in a round, and what making that took in seconds."""

    proposals: list[Proposal] = field(default_factory=list)
    """One for each sequence."""
    all_s: float = 0.0
    """All of it, even if there was nothing to propose."""
    looking_s: float = 0.0
    """The part that looked for copies."""
    drafting_s: float = 0.0
    """The part in which the draft ran; 0: it did not."""
    catching_up_s: float = 0.0
    """The part of that in which it read what it had missed, prompts above all."""


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """All rows of a round, in the order of the target's pass: those that decode, then prompts."""

    decoding: list[DecodingRow]
    prompts: list[PromptRow]
    expected_s: float
    """What the pass and the commit are expected to take without the prompts, in seconds."""
    proposed: ProposedRound = field(default_factory=ProposedRound)
    """What the decoding rows were made of."""
    copied_prefix: bool = False
    """Making the plan took the time of copying a prompt's prefix from another slot."""
    wants_speculation: bool = field(kw_only=True)
    """False: no sequence took proposals when the plan was made. In the round a grammar may stop taking them."""

    @property
    def num_decoding_columns(self) -> int:
        """Columns of the decoding rows."""
        return sum([1 + len(row.proposal.tokens) for row in self.decoding])

    @property
    def name(self) -> str:
        """Which of request.PLANS it counts as."""
        return max((row.proposal.plan for row in self.decoding), key=PLANS.index, default="plain")

    @property
    def num_prompt_tokens(self) -> int:
        """Columns of the prompt rows."""
        return sum(len(row.tokens) for row in self.prompts)


class RowOutcome(NamedTuple):
    """What a decoding row has come to."""

    tokens: list[int]
    """The accepted proposals, and the target's own token that follows them."""
    columns: list[int]
    """For each of `tokens`, the column whose logits decided it: column 0, then the accepted columns."""


def judge(proposal: Proposal, own_tokens: list[int]) -> RowOutcome:
    """Accept the proposals that equal the target's own token at the column that they follow.

    `own_tokens`: the token that the target chooses at every column. Whatever is proposed, the sequence therefore goes
    on as plain decoding would have: with the target's own choices, and no others.
    """
    accepted = accepted_path(proposal.tokens, proposal.parents, own_tokens)
    columns = [0, *accepted]
    return RowOutcome([*(proposal.tokens[column - 1] for column in accepted), own_tokens[columns[-1]]], columns)
