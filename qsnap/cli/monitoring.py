"""Monitoring of snapshots: metrics for Prometheus, and the answer of a monitoring plugin."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qsnap.cli.common import Action, Options
from qsnap.cli.output.results import Outcome, PluginAnswer, exit_code_of
from qsnap.cli.output.show import say
from qsnap.cli.several import do
from qsnap.errors import BadUsage, QsnapError
from qsnap.model.qemu import Struct
from qsnap.model.results import DrillResult, SaveResult
from qsnap.model.snapshots import Snapshot
from qsnap.tags import is_of_series
from qsnap.upkeep import metrics
from qsnap.upkeep.freshness import Health, Level, is_sound, judge
from qsnap.upkeep.metrics import Metric
from qsnap.upkeep.retention import Duration

if TYPE_CHECKING:
    from qsnap.operations.progress import Watcher
    from qsnap.targets.config import Settings
    from qsnap.vm import VM


class Measured(Struct, frozen=True):
    """A result, and the figures that were taken with it."""

    result: Struct
    figures: Mapping[Metric, float]


class MetricsRecorder:
    """Writes down what became of VMs; nothing without a file for it.

    :param of_drills: of restore drills, and not of saves.
    :raise BadUsage: the file could not be written.
    """

    def __init__(self, path: Path | None, prefix: str | None, *, of_drills: bool = False) -> None:
        self._path = path
        self._prefix = prefix
        self._of_drills = of_drills
        self._trouble = ""
        if path is not None:
            metrics.check(path)

    def around(self, action: Action) -> Action:
        """*action*, and a look at the snapshots after it."""
        if self._path is None:
            return action

        async def measured(vm: VM, settings: Settings, watch: Watcher | None) -> Measured:
            result = await action(vm, settings, watch)
            if isinstance(result, SaveResult):
                figures = {
                    metrics.LAST_SUCCESS: time.time(),
                    metrics.PAUSE: result.pause_ms / 1000,
                    metrics.DURATION: result.duration_ms / 1000,
                }
                left_out: Sequence[str] = result.excluded
            else:
                figures, left_out = _figures_of_drill(result), await _left_out(vm, settings)
            return Measured(result=result, figures={**figures, **_figures(await vm.list(), self._prefix, left_out)})

        return measured

    def record(self, outcome: Outcome) -> Outcome:
        """Record the outcome of a VM as metrics, and return it without the figures."""
        title, result = outcome
        values: dict[Metric, float] = {}
        if isinstance(result, Measured):
            values.update(result.figures)
            result = result.result
        if self._path is not None:
            failed = isinstance(result, QsnapError)
            if self._of_drills:
                values[metrics.DRILL_EXIT_CODE] = exit_code_of(result)
            elif failed or metrics.LAST_SUCCESS in values:
                values[metrics.LAST_EXIT_CODE] = exit_code_of(result)
            failed = failed and not self._of_drills
            try:
                metrics.update(self._path, {"vm": title, "prefix": self._prefix or ""}, values, failed=failed)
            except QsnapError as error:
                self._trouble = str(error)
        return Outcome(title, result)

    def exit_code(self, code: int) -> int:
        """The exit code of the command: *code*, or 1 if *code* is 0 and the metrics could not be written."""
        if self._trouble:
            say(f"qsnap: {self._trouble}")
        return code or (QsnapError.exit_code if self._trouble else 0)


def _figures_of_drill(result: Struct) -> dict[Metric, float]:
    if not isinstance(result, DrillResult):
        return {}
    return {metrics.DRILL_SUCCESS: time.time(), metrics.DRILL_DURATION: result.duration_ms / 1000}


def _figures(found: Sequence[Snapshot], prefix: str | None, left_out: Collection[str]) -> dict[Metric, float]:
    """The metrics of the snapshots of a VM, or of a series."""
    series = [one for one in found if prefix is None or is_of_series(one.tag, prefix)]
    figures: dict[Metric, float] = {metrics.COUNT: len(series)}
    if newest := max((one for one in series if is_sound(one, left_out)), key=lambda one: one.date, default=None):
        figures[metrics.NEWEST] = newest.date.timestamp()
        figures[metrics.AGE] = time.time() - newest.date.timestamp()
        figures[metrics.SIZE] = newest.vm_state_size
    return figures


async def _left_out(vm: VM, settings: Settings) -> Sequence[str]:
    """The node-names that the config file leaves out of snapshots."""
    if not settings.exclude:
        return ()
    return (await vm.check(exclude=settings.exclude)).excluded


def plugin_answer(
    options: Options, recorder: MetricsRecorder, prefix: str | None, max_age: str, warn_age: str | None
) -> Struct:
    """Whether snapshots are fresh: of each VM, and whatever goes wrong, the answer of a monitoring plugin."""

    async def look(vm: VM, settings: Settings, _: object) -> PluginAnswer:
        status = await vm.status()
        troubles = [status.trouble] if status.trouble else []
        if status.is_half_restored:
            troubles.append("a load failed midway: saves are refused until a good snapshot is loaded")
        if status.run is not None and status.run.is_alive is False:
            troubles.append("a qsnap died and has not been cleaned up after: qsnap recover")
        health = judge(
            await vm.list(),
            datetime.now().astimezone(),
            oldest,
            warn_age=old,
            prefix=prefix,
            left_out=await _left_out(vm, settings),
            troubles=troubles,
            in_backing=status.in_backing,
        )
        return PluginAnswer(health=health)

    def unknown(error: QsnapError) -> PluginAnswer:
        return PluginAnswer(health=Health(level=Level.UNKNOWN, message=str(error)))

    def answered(outcome: Outcome) -> Outcome:
        if isinstance(outcome.result, QsnapError):
            return Outcome(outcome.title, unknown(outcome.result))
        return recorder.record(outcome)

    try:
        oldest = Duration.parse_age(max_age)
        old = Duration.parse_age(warn_age) if warn_age is not None else None
        now = datetime.now().astimezone()
        if old and old.before(now) <= oldest.before(now):
            raise BadUsage(f"--warn-age {warn_age} must be shorter than --max-age {max_age}: it would never warn")
        return do(options, recorder.around(look), answered, looks=True)
    except QsnapError as error:
        return unknown(error)
