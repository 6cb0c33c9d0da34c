"""Advice about plugged blocks: what changes where their content is, and never what it is.

`collapse` has the kernel put it into huge pages, `cold` and `pageout` say that it is
not needed for now.  The blocks stay plugged throughout, so there is nothing to undo:
an operation that stops half way has advised a part of them.
"""

from __future__ import annotations

import os
import warnings

from sparsemem.backends.base import Mapping
from sparsemem.blocks import BlockMap, Claim, Map, Want
from sparsemem.engine import StepFailedError, Work
from sparsemem.errors import AdviceError, HugePageSplitWarning, Run, UnsupportedError
from sparsemem.operations import Core, Operation
from sparsemem.runs import clip
from sparsemem.units import exact_size


class Advise(Operation):
    """Gives one advice, a key of `recipes.ADVICE`, about blocks that are plugged."""

    def __init__(self, core: Core, claim: Claim, advice: str) -> None:
        super().__init__(core, claim)
        self._advice = advice

    def perform(self) -> int:
        core, claim = self.core, self.claim
        # Before the probes, which a closed region need not wait for.
        core.blocks.check_open()
        refusal = core.mapping.refusal(self._advice)
        if refusal:
            raise UnsupportedError(f"cannot {self._advice}: {refusal}")
        claim.take(Want.WITHIN_PLUGGED)
        work = Work(core.mapping, self._advice, claim.runs, core.shift)
        if self._advice == "collapse":
            # A page that cannot be made huge says nothing about the next one.
            work.run_through()
        else:
            try:
                work.run()
            except StepFailedError as failure:
                raise self._explain(failure) from None
        claim.finish()
        return work.collapsed

    def undo(self, error: BaseException | None) -> None:
        if self.claim.open:
            self.claim.finish()
            self.core.tally.failed(rolled_back=False)

    def _explain(self, failure: StepFailedError) -> AdviceError:
        return AdviceError(
            failure.errno,
            f"cannot {self._advice} block {failure.offset >> self.core.shift}: {os.strerror(failure.errno)}; "
            "the blocks and their content are as they were (locked memory cannot be advised so)",
        )


def huge_runs(mapping: Mapping, blocks: BlockMap, shift: int) -> tuple[Run, ...]:
    """Runs of plugged blocks of `1 << shift` bytes that are huge pages and nothing else.

    Raises:
        UnsupportedError: The kernel does not tell.
    """
    found = mapping.huge_pages(0, mapping.size)
    if found is None:
        raise UnsupportedError("nobody tells which pages are huge: it takes the kernel's memory and Linux 6.7")
    whole = [(-(-start >> shift), (start + length) >> shift) for start, length in found]
    inside = ((first, end - first) for first, end in whole if first < end)
    return tuple(clip(inside, blocks.runs(Map.PLUGGED, True)))


def warn_of_split(mapping: Mapping, offset: int, length: int, *, stacklevel: int) -> None:
    """Warns if a discard of these bytes cuts a page that is huge.

    Such a discard frees nothing until the kernel splits the page (512 MiB stayed
    charged with 1 MiB in use, measured), and what is left of it is small pages.
    Before any claim, for how warnings are shown is the user's code.
    """
    huge, end = mapping.granule, offset + length
    if huge == mapping.page_size:
        return
    cut = {at - at % huge for at in (offset, end) if at % huge}
    split = [at for at in sorted(cut) if any(mapping.huge_pages(at, huge) or ())]
    if split:
        warnings.warn(
            f"discarding bytes {offset} to {end - 1} splits the huge page of {exact_size(huge)} at offset {split[0]}: "
            "its memory may stay in use, and what is kept becomes small pages; collapse() makes it huge again",
            HugePageSplitWarning,
            stacklevel=stacklevel + 1,
        )
