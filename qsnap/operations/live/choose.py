"""Whether a save is made live: as requested, or, with ``--live=auto``, whenever that is possible."""

from __future__ import annotations

from typing import Literal

import msgspec

from qsnap.errors import CommandFailed, JobFailed, NotSupported, PrecheckRefused, QsnapError
from qsnap.model.checks import Finding
from qsnap.model.qemu import RunState
from qsnap.model.requests import SaveRequest
from qsnap.model.results import SaveResult
from qsnap.operations.progress import Watcher
from qsnap.operations.save import do_savevm
from qsnap.runs.run import Run


async def save_live_or_not(
    run: Run, request: SaveRequest, live: bool | Literal["auto"], watch: Watcher | None
) -> SaveResult:
    """Save the guest live, or the ordinary way; the result's warnings say why it was not live.

    :param live: "auto" saves the ordinary way if a live save is not possible, or failed and was undone. A guest
        that does not run gains nothing by a live save, and is saved the ordinary way in any case. In a group a live
        save that has failed is not repeated: the others have been stopped already.
    """
    if not live:
        return await do_savevm(run, request, watch)
    if await run.monitor.runstate() is not RunState.RUNNING:
        why = "the guest does not run, so nothing is gained by a live save"
        return await _saved_the_ordinary_way(run, request, watch, why)
    from qsnap.operations.live.save import do_live_save, plan_live

    try:
        plan = await plan_live(run, request)
    except (NotSupported, PrecheckRefused, CommandFailed, JobFailed) as error:
        if live != "auto":
            raise
        return await _saved_the_ordinary_way(run, request, watch, str(error))
    try:
        return await do_live_save(run, plan, watch)
    except QsnapError as error:
        if live != "auto" or not error.undone or run.journal.member is not None:
            raise
        return await _saved_the_ordinary_way(run, request, watch, str(error))


async def _saved_the_ordinary_way(run: Run, request: SaveRequest, watch: Watcher | None, why: str) -> SaveResult:
    result = await do_savevm(run, request, watch)
    finding = Finding.warning("not-live", f"saved the ordinary way: {why}")
    return msgspec.structs.replace(result, warnings=(*result.warnings, finding))
