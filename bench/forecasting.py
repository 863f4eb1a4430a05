"""The forecast beside its peers, on traces of real requests: rolling origins, the last 30 % of each series held back.

``bench/control_loop.py --only forecast`` runs it (with ``--validation`` to choose between models, as the test part must
not be used for that). The traces are those of ``bench/traces``, or of the folder that
``KEYQUORUM_TRACES`` names. All models say the next ten steps at the same origins. Ours is ``predict_load`` itself, one
call a step with the state of the call before, as the balancer makes them. The peers are statsforecast's, refitted every
``REFIT_STEPS`` steps, but at most ``REFITS_MAX`` times in a part, as they take seconds, and carried forward with their
parameters on the newest counts in between. MASE is over the one-step naive error on the part before the test. The best
peer of a series is the one that was best on its validation part.
"""

from __future__ import annotations

import csv
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from figures import Row
from numpy.typing import NDArray

from balancer.bank import Outlook
from balancer.features import HORIZONS
from balancer.forecast import FITS_AT_ONCE, ForecastState, predict_load
from balancer.history import CLASSES, HistorySnapshot, SlowHistory

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

HERE: Final = Path(__file__).parent
FINE_STEPS_S: Final = (1, 3, 10)
"""Steps to which counts by the second or so are added up; longer ones are judged as they are, and two together."""
LONG_S: Final = 60
LONGEST_S: Final = 600
STEPS_MIN: Final = 120
TEST_PART: Final = 0.3
VALIDATION_PART: Final = 0.2
"""The part before the test, on which peers are picked and models chosen."""
REFIT_STEPS: Final = 200
REFITS_MAX: Final = 4
PEER_ROWS: Final = 2_000
FINE_S: Final = 3
DAY_S: Final = 86_400
ALPHAS: Final = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)


@dataclass(frozen=True, slots=True)
class Series:
    """One series of counts, (steps,), in steps of so many seconds."""

    name: str
    trace: str
    step_s: int
    counts: FloatArray

    @property
    def season(self) -> int:
        """The steps of a day, or of a minute where steps are short."""
        return DAY_S // self.step_s if self.step_s >= 60 else max(2, 60 // self.step_s)


@dataclass(frozen=True, slots=True)
class Scale:
    """At how many origins of the validation and the test part forecasts are made."""

    validation: int
    test: int


FULL: Final = Scale(120, 240)
QUICK: Final = Scale(12, 24)


@dataclass(frozen=True, slots=True)
class Told:
    """What a model said: (origins, HORIZONS) points and P90s (None for a model without), and seconds a fit."""

    point: FloatArray
    p90: FloatArray | None
    fit_s: float = 0.0


def load_series(folder: Path) -> list[Series]:
    """All series of the folder's CSV files (timestamp in seconds, type, count); steps without a line count 0."""
    found = []
    for file in sorted(folder.glob("*.csv")):
        by_type: dict[str, dict[int, float]] = {}
        with file.open(encoding="utf-8") as lines:
            for line in csv.DictReader(lines):
                by_type.setdefault(line["type"], {})[int(float(line["timestamp"]))] = float(line["count"])
        for kind, at in by_type.items():
            when = np.array(sorted(at))
            step = int(np.diff(when).min())
            counts = np.zeros((when[-1] - when[0]) // step + 1)
            counts[(when - when[0]) // step] = [at[each] for each in when.tolist()]
            for longer in _steps(step):
                many = longer // step
                summed = counts[: len(counts) // many * many].reshape(-1, many).sum(axis=1)
                if len(summed) >= STEPS_MIN:
                    found.append(Series(f"{file.stem}:{kind}/{longer}s", file.name, longer, summed))
    return found


def _steps(step_s: int) -> list[int]:
    if step_s >= LONG_S:
        return [step_s, 2 * step_s] if 2 * step_s <= LONGEST_S else [step_s]
    return [longer for longer in FINE_STEPS_S if longer % step_s == 0] or [step_s]


# --- the models -------------------------------------------------------------------------------------------------------


def ours(group: Sequence[Series], origins: IntArray) -> tuple[list[Told], list[Told]]:
    """What ``predict_load`` says of series of one step and length: medians, and means, with the P90s.

    It is called at every step from the first origin on.
    """
    counts = np.stack([each.counts for each in group], axis=1)
    step_s = group[0].step_s
    wanted, state = set(origins.tolist()), None
    said: list[Outlook] = []
    for origin in range(int(origins[0]), int(origins[-1]) + 1):
        forecast = predict_load(snapshot(counts[:origin], step_s * 1000), state)
        state = forecast.state
        if origin in wanted:
            said.append(forecast.outlook)
    p90 = np.stack([each.p90 for each in said], axis=1) * step_s
    medians = np.stack([each.median for each in said], axis=1) * step_s
    means = np.stack([each.mean for each in said], axis=1) * step_s
    series = range(len(group))
    return [Told(medians[each], p90[each]) for each in series], [Told(means[each], p90[each]) for each in series]


def snapshot(counts: FloatArray, tick_ms: int) -> HistorySnapshot:
    """A history of these counts, (ticks, classes)."""
    nothing = np.zeros((counts.shape[1], 1))
    return HistorySnapshot(
        tick_ms=tick_ms,
        classes=CLASSES[: counts.shape[1]],
        nodes=("a",),
        counts=counts,
        requests=nothing,
        busy_us=nothing,
        up=(True,),
        queue=(0,),
        tick=len(counts) - 1,
    )


def simple(series: Series, origins: IntArray) -> dict[str, Told]:
    """Naive, seasonal naive, and the EWMA whose alpha was best on the validation part."""
    counts, season = series.counts, series.season
    naive = np.repeat(counts[origins - 1][:, None], HORIZONS, axis=1)
    ahead = np.arange(HORIZONS) % season
    seasonal = counts[origins[:, None] - season + ahead[None, :]] if season < origins[0] else naive
    judged = validation_origins(series, len(series.counts))
    levels = {alpha: _ewma(counts, alpha) for alpha in ALPHAS}
    best = min(ALPHAS, key=lambda alpha: float(errors(counts, judged, _flat(levels[alpha], judged)).mean()))
    return {
        "naive": Told(naive, None),
        "seasonal naive": Told(seasonal, None),
        "tuned EWMA": Told(_flat(levels[best], origins), None),
    }


def _flat(level: FloatArray, origins: IntArray) -> FloatArray:
    return np.repeat(level[origins - 1][:, None], HORIZONS, axis=1)


def _ewma(counts: FloatArray, alpha: float) -> FloatArray:
    level, told = counts[0], np.empty_like(counts)
    for index, count in enumerate(counts):
        level += alpha * (count - level)
        told[index] = level
    return told


def peers(step_s: int) -> dict[str, Callable[[int], Any]]:
    """The peers by name, as makers of a model for a history of so many rows.

    AutoARIMA and AutoETS are without a season: with one of 144 steps a fit takes minutes. Theta has the day's too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from statsforecast.models import AutoARIMA, AutoETS, DynamicOptimizedTheta

    day = DAY_S // step_s
    made: dict[str, Callable[[int], Any]] = {
        "AutoARIMA": lambda _: AutoARIMA(season_length=1),
        "AutoETS": lambda _: AutoETS(season_length=1),
        "DynamicOptimizedTheta": lambda _: DynamicOptimizedTheta(season_length=1),
    }
    if step_s >= 60:
        made["DynamicOptimizedTheta, day"] = lambda rows: DynamicOptimizedTheta(
            season_length=day if rows > 2 * day else 1
        )
    return made


def peer(make: Callable[[int], Any], counts: FloatArray, origins: IntArray) -> Told:
    """What a peer says at these origins."""
    point, p90 = np.empty((len(origins), HORIZONS)), np.empty((len(origins), HORIZONS))
    model, fitted, spent, fits = None, 0, 0.0, 0
    refit = max(REFIT_STEPS, math.ceil((origins[-1] + 1 - origins[0]) / REFITS_MAX))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row, origin in enumerate(origins.tolist()):
            known = counts[max(0, origin - PEER_ROWS) : origin]
            if model is None or origin - fitted >= refit:
                begun = time.perf_counter()
                model, fitted = make(len(known)).fit(known), origin
                spent, fits = spent + time.perf_counter() - begun, fits + 1
                told = model.predict(HORIZONS, level=[80])
            else:
                told = model.forward(known, HORIZONS, level=[80])
            point[row], p90[row] = told["mean"], told["hi-80"]
    return Told(point, p90, spent / fits)


# --- judging ----------------------------------------------------------------------------------------------------------


def test_origins(series: Series, most: int) -> IntArray:
    """Origins of the test part: the first step that is to be forecast."""
    steps = len(series.counts)
    return _spread(int(steps * (1 - TEST_PART)), steps - HORIZONS, most)


def validation_origins(series: Series, most: int) -> IntArray:
    """Origins of the validation part, none of which looks into the test part."""
    steps = len(series.counts)
    return _spread(int(steps * (1 - TEST_PART - VALIDATION_PART)), int(steps * (1 - TEST_PART)) - HORIZONS, most)


def _spread(first: int, last: int, most: int) -> IntArray:
    return np.arange(first, last + 1, max(1, math.ceil((last + 1 - first) / most)))


def actual(counts: FloatArray, origins: IntArray) -> FloatArray:
    """What came, (origins, HORIZONS)."""
    return counts[origins[:, None] + np.arange(HORIZONS)[None, :]]


def errors(counts: FloatArray, origins: IntArray, point: FloatArray) -> FloatArray:
    """Mean absolute errors by horizon."""
    return np.abs(actual(counts, origins) - point).mean(axis=0)


def pinball(counts: FloatArray, origins: IntArray, p90: FloatArray) -> FloatArray:
    """Mean pinball losses of a P90 by horizon (Koenker and Bassett 1978)."""
    over = actual(counts, origins) - p90
    return np.maximum(0.9 * over, -0.1 * over).mean(axis=0)


def geometric(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


@dataclass(slots=True)
class Judged:
    """By model: MASE and pinball loss over the naive scale, (HORIZONS,), and how often the P90 held."""

    series: Series
    mase: dict[str, FloatArray]
    pinball: dict[str, FloatArray]
    covered: dict[str, FloatArray]
    best: tuple[str, str]
    """The peers that were best on the validation part at the first and at the last horizon."""


def judge(everything: Sequence[Series], scale: Scale, part: str, tell: Callable[[str], None]) -> list[Judged]:
    """All models on all series; on the validation part the peers are picked with hindsight."""
    groups: dict[tuple[str, int, int], list[Series]] = {}
    for each in everything:
        groups.setdefault((each.trace, each.step_s, len(each.counts)), []).append(each)
    judged = []
    for group in groups.values():
        chosen = validation_origins(group[0], scale.validation)
        origins = test_origins(group[0], scale.test) if part == "test" else chosen
        begun = time.monotonic()
        told_ours, told_means = ours(group, origins)
        took = time.monotonic() - begun
        for index, series in enumerate(group):
            told = {"ours": told_ours[index], "our mean": told_means[index], **simple(series, origins)}
            picked: dict[str, FloatArray] = {}
            for name, make in peers(series.step_s).items():
                told[name] = peer(make, series.counts, origins)
                before = told[name] if part != "test" else peer(make, series.counts, chosen)
                picked[name] = errors(series.counts, chosen, before.point)
            judged.append(_judged(series, origins, told, picked))
            best = judged[-1].mase
            tell(
                f"{series.name} ({len(origins)} origins, ours {took:.0f} s): "
                + ", ".join(f"{name} {value[0]:.3f}/{value[-1]:.3f}" for name, value in best.items())
            )
    return judged


def _judged(series: Series, origins: IntArray, told: dict[str, Told], picked: dict[str, FloatArray]) -> Judged:
    before = series.counts[: int(len(series.counts) * (1 - TEST_PART))]
    naive = float(np.abs(np.diff(before)).mean())
    with_p90 = {name: each.p90 for name, each in told.items() if each.p90 is not None}
    came = actual(series.counts, origins)
    return Judged(
        series,
        {name: errors(series.counts, origins, each.point) / naive for name, each in told.items()},
        {name: pinball(series.counts, origins, p90) / naive for name, p90 in with_p90.items()},
        {name: (came <= p90).mean(axis=0) for name, p90 in with_p90.items()},
        (min(picked, key=lambda name: picked[name][0]), min(picked, key=lambda name: picked[name][-1])),
    )


# --- rows -------------------------------------------------------------------------------------------------------------


def _ratio_row(
    name: str, pairs: Sequence[tuple[float, float]], unit: str, other: str, target: float, stretch: float
) -> Row:
    value, against = geometric([mine for mine, _ in pairs]), geometric([theirs for _, theirs in pairs])
    ratio = value / against
    return Row(
        name, round(value, 4), unit, other, round(against, 4), round(ratio, 4), target, stretch, ratio <= target,
        ratio <= stretch,
    )  # fmt: skip


def accuracy_rows(judged: Sequence[Judged]) -> list[Row]:
    """The rows on accuracy, geometric means over the series."""
    fine = [each for each in judged if each.series.step_s <= FINE_S]
    told = []
    for horizon, place in ((1, 0), (HORIZONS, 1)):
        for what, chosen in (("all", judged), ("1-3 s", fine), ("10 s and more", [e for e in judged if e not in fine])):
            told.append(
                _ratio_row(
                    f"MASE h{horizon}, {what}",
                    [(each.mase["ours"][horizon - 1], each.mase[each.best[place]][horizon - 1]) for each in chosen],
                    "MASE",
                    "best of AutoARIMA, AutoETS, Theta",
                    1.00,
                    0.97,
                )
            )
    for other, target, stretch in (("AutoARIMA", 0.95, 0.90), ("seasonal naive", 0.60, 0.55)):
        pairs = [(each.mase["ours"][0], each.mase[other][0]) for each in fine]
        told.append(_ratio_row(f"MASE h1, 1-3 s, over {other}", pairs, "MASE", other, target, stretch))
    for other in ("tuned EWMA", "naive", "our mean"):
        pairs = [(each.mase["ours"][0], each.mase[other][0]) for each in judged]
        row = _ratio_row(f"MASE h1, all, over {other}", pairs, "MASE", other, math.inf, math.inf)
        told.append(Row(row.name, row.value, row.unit, row.peer, row.peer_value, row.ratio))
    covered = np.array([each.covered["ours"] for each in judged])
    for name, value in (
        ("P90 coverage, mean of all series and horizons", float(covered.mean())),
        ("P90 coverage, h1", float(covered[:, 0].mean())),
        (f"P90 coverage, h{HORIZONS}", float(covered[:, -1].mean())),
    ):
        percent = round(100 * value, 2)
        told.append(
            Row(name, percent, "%", "AutoARIMA's", _percent(judged, name), None, 93.0, 92.0,
                87 <= percent <= 93, 88 <= percent <= 92)
        )  # fmt: skip
    worst = max(judged, key=lambda each: abs(float(each.covered["ours"].mean()) - 0.9))
    told.append(
        Row(f"P90 coverage, worst series ({worst.series.name})", round(100 * worst.covered["ours"].mean(), 2), "%")
    )
    for horizon, target, stretch in ((1, 0.92, 0.85), (HORIZONS, None, None)):
        pairs = [(each.pinball["ours"][horizon - 1], each.pinball["AutoARIMA"][horizon - 1]) for each in judged]
        row = _ratio_row(
            f"P90 pinball h{horizon}, all", pairs, "naive errors", "AutoARIMA", target or 1.0, stretch or 1.0
        )
        told.append(row if target else Row(row.name, row.value, row.unit, row.peer, row.peer_value, row.ratio))
    return told


def _percent(judged: Sequence[Judged], name: str) -> float:
    covered = np.array([each.covered["AutoARIMA"] for each in judged])
    part = covered[:, 0] if name.endswith("h1") else covered[:, -1] if name.endswith(f"h{HORIZONS}") else covered
    return round(100 * float(part.mean()), 2)


def training_row(everything: Sequence[Series]) -> Row:
    """A fit for ten horizons on 2,000 rows, the first prediction included, beside AutoARIMA's: median of the series."""
    long = [each for each in everything if len(each.counts) >= PEER_ROWS]
    mine, theirs = [], []
    for series in long:
        counts = series.counts[-PEER_ROWS:]
        state = snapshot(counts[:, None], series.step_s * 1000)
        predict_load(state)
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            predict_load(state)
            times.append(time.perf_counter() - begun)
        mine.append(float(np.median(times)))
        theirs.append(peer(peers(series.step_s)["AutoARIMA"], counts, np.array([PEER_ROWS])).fit_s)
    ratio = float(np.median(np.array(mine) / np.array(theirs)))
    return Row(
        "training, 10 horizons, 2,000 rows", round(1000 * float(np.median(mine)), 3), "ms", "AutoARIMA",
        round(1000 * float(np.median(theirs)), 3), round(ratio, 5), round(1 / 30, 5), 0.01,
        ratio <= 1 / 30, ratio <= 0.01,
    )  # fmt: skip


def tick_rows(*, pairs: int = 256, ticks: int = 60) -> list[Row]:
    """The forecast's part of a tick with all classes and as many pairs as have series, at both cadences: CPU time.

    It has one thread. scikit-learn, which the first forecast imports, is loaded before.
    """
    random = np.random.default_rng(7)
    classes, steps, minutes = len(CLASSES), 3_600, 4_320
    counts = random.poisson(200, (steps + ticks, classes)).astype(float)
    of_pairs = random.poisson(20, (600 + ticks, pairs)).astype(float)
    slow = random.poisson(12_000, (minutes, classes)).astype(float)
    slow_pairs = random.poisson(1_200, (1_440, pairs)).astype(float)
    nothing = np.zeros((classes, 1))
    state: ForecastState | None = None
    taken = []
    predict_load(snapshot(counts[:600, :1], 1000))
    for tick in range(ticks):
        now = HistorySnapshot(
            tick_ms=1000,
            classes=CLASSES,
            nodes=("a",),
            counts=counts[tick : steps + tick],
            requests=nothing,
            busy_us=nothing,
            up=(True,),
            queue=(0,),
            tick=steps + tick,
            pairs=tuple((index % classes, index) for index in range(pairs)),
            pair_counts=of_pairs[tick : 600 + tick],
            slow=SlowHistory(60_000, minutes + tick // 60, slow, slow_pairs),
        )
        begun = time.process_time()
        forecast = predict_load(now, state)
        taken.append(time.process_time() - begun)
        state = forecast.state
        assert np.abs(forecast.mean / 200 - 1).max() < 0.3
    name = f"forecast of a tick (CPU), {classes} classes and {pairs} pairs, ticks and minutes"
    return [
        Row(f"{name}, median", round(1000 * float(np.median(taken[1:])), 2), "ms"),
        Row(f"{name}, 95 %", round(1000 * float(np.quantile(taken[1:], 0.95)), 2), "ms"),
        Row(f"{name}, the first ({FITS_AT_ONCE} fits a cadence)", round(1000 * taken[0], 2), "ms"),
    ]


def rows(quick: bool, *, part: str = "test", tell: Callable[[str], None] = click.echo) -> list[Row]:
    """All rows of the forecast."""
    everything = load_series(Path(os.environ.get("KEYQUORUM_TRACES") or HERE / "traces"))
    judged = judge(everything, QUICK if quick else FULL, part, tell)
    return [*accuracy_rows(judged), training_row(everything), *tick_rows()]
