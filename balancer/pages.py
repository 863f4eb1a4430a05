"""The balancer over HTTP: metrics for Prometheus, health, the plan as JSON, and one page that draws it.

The threads of the server read what control loop and service handed over, all of it immutable, and touch nothing else.
Labels are request classes, the cluster's nodes and the like: their number is bounded, and none is a key's name.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from importlib.resources import files
from typing import Final

import msgspec
import numpy as np
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from balancer.bank import accuracy
from balancer.features import HORIZONS
from balancer.loop import ControlLoop, Service, Standing, Told, now_ms
from balancer.migrate import Kind
from balancer.view import PlanPage, View, loads, plan_page
from engine._version import __version__
from engine.client.httpconfig import HttpConfig
from engine.client.web import Answer, Page, WebServer, metrics_answer, service_metrics, text_answer
from engine.protocol.manifest import ClusterSource

__all__ = ["Pages", "serve_pages"]

CLIENTS: Final = 16
"""A browser opens several connections at once, some of which it may not use."""
SILENT_TICKS: Final = 5
SILENT_S_MIN: Final = 30.0
"""A loop that did not end a tick for so long is stuck."""
LOOK_S_MAX: Final = 10.0
"""So is a service that did not look about for so long."""
HORIZONS_TOLD: Final = ((1, 0), (HORIZONS, HORIZONS - 1))
MILLI: Final = 1000
PAGE_FILES: Final = {
    "/": ("status.html", "text/html; charset=utf-8"),
    "/status.js": ("status.js", "text/javascript; charset=utf-8"),
    "/status.css": ("status.css", "text/css; charset=utf-8"),
    "/uPlot.js": ("uPlot.iife.min.js", "text/javascript; charset=utf-8"),
    "/uPlot.css": ("uPlot.min.css", "text/css; charset=utf-8"),
}
PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page loads nothing from elsewhere, and is in nobody's frame."""


class Pages:
    """What is answered, and from what."""

    def __init__(self, loop: ControlLoop, service: Service, cluster: ClusterSource, name: str) -> None:
        self._loop = loop
        self._service = service
        self._source = cluster
        self._name = name
        self._lock = threading.Lock()
        self._plan: tuple[Standing, object, bytes] | None = None

    def pages(self) -> dict[str, Page]:
        """By their paths."""
        return {
            **{path: _static(name, kind) for path, (name, kind) in PAGE_FILES.items()},
            "/metrics": lambda accept: metrics_answer(_Metrics(self), accept),
            "/healthz": lambda _: _checked(self.sick()),
            "/readyz": lambda _: _checked(self.unready()),
            "/v1/plan": lambda _: Answer(self.plan_json(), "application/json"),
        }

    @property
    def loop(self) -> ControlLoop:
        """The control loop, of which immutable objects alone are read."""
        return self._loop

    @property
    def told(self) -> Told | None:
        """What the service told last."""
        return self._service.told

    @property
    def cluster_serial(self) -> int:
        """Of the manifest in force."""
        return self._source.cluster.serial

    def sick(self) -> str:
        """Why the process had better be started anew; empty if it is well."""
        now, told = time.monotonic(), self.told
        idle_s = now - self._loop.work.ended_s
        if idle_s > max(SILENT_S_MIN, SILENT_TICKS * self._loop.tick_ms / MILLI):
            return f"no tick of the control loop has ended for {idle_s:.0f} s"
        if told is not None and now - told.seen_s > LOOK_S_MAX:
            return f"the registry service has done nothing for {now - told.seen_s:.0f} s"
        return ""

    def unready(self) -> str:
        """Why nothing it publishes is in force; empty if something is, or if another balancer leads."""
        if self._service.stands_by:
            return ""
        table = self._loop.standing.table
        if table is None:
            return "no routing table was published yet"
        late_ms = now_ms() - table.expires_ms
        return f"the last routing table expired {late_ms / MILLI:.0f} s ago" if late_ms > 0 else ""

    def plan_json(self) -> bytes:
        """``/v1/plan``, made once a tick, however many ask."""
        with self._lock:
            standing, plan = self._loop.standing, self._loop.plan
            if self._plan is None or self._plan[0] is not standing or self._plan[1] is not plan:
                head = PlanPage(
                    self._name,
                    self._source.cluster.name,
                    self.cluster_serial,
                    __version__,
                    now_ms(),
                    self._loop.tick_ms,
                    standing.ticks,
                    standing.last_error,
                    dict(self._loop.series_problems),
                )
                body = msgspec.json.encode(plan_page(head, standing.table, standing.view, plan))
                self._plan = standing, plan, body
            return self._plan[2]


def serve_pages(config: HttpConfig, pages: Pages) -> WebServer:
    """Answer until it is closed; errors as of ``WebServer``."""
    return WebServer(config, "http", pages.pages(), CLIENTS)


def _checked(problem: str) -> Answer:
    return text_answer(problem, HTTPStatus.SERVICE_UNAVAILABLE) if problem else text_answer("ok")


def _static(name: str, kind: str) -> Callable[[str], Answer]:
    body = (files("balancer") / "page" / name).read_bytes()
    answer = Answer(body, kind, headers={"Content-Security-Policy": PAGE_POLICY})
    return lambda _: answer


class _Metrics(Collector):
    """One look at what was handed over, in Prometheus' words."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._standing = pages.loop.standing

    def collect(self) -> Iterable[Metric]:
        yield from self._numbers()
        yield from self._work()
        yield from self._moves()
        if self._standing.view is not None:
            yield from self._nodes(self._standing.view)
            yield from self._load(self._standing.view)
            yield from self._errors(self._standing.view)

    def _numbers(self) -> Iterator[Metric]:
        pages, standing, told = self._pages, self._standing, self._pages.told
        table, plan = standing.table, pages.loop.plan
        info = GaugeMetricFamily("keyquorum_balancer_build_info", "Always 1.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        moves = () if plan.placement is None else plan.placement.steps
        numbers: list[tuple[str, str, float]] = [
            ("ready", "1 if a routing table is in force, else 0.", int(not pages.unready())),
            ("failing", "1 if the control loop goes by an earlier decision, else 0.", int(bool(standing.last_error))),
            ("cluster_serial", "Serial of the cluster manifest in force.", pages.cluster_serial),
            ("series_out", "External series that the forecast goes without.", len(pages.loop.series_problems)),
            ("planned_moves", "Steps of the newest plan for the placement groups.", len(moves)),
            ("hinted_groups", "Placement groups that the table has hints for.", len(table.hints) if table else 0),
            ("table_counter", "Counter of the last routing table.", standing.counter),
        ]
        if table is not None:
            numbers += [
                ("fencing_epoch", "Grows with every start on this registry.", table.fencing_epoch),
                ("table_expiry_timestamp_seconds", "When the last routing table expires.", table.expires_ms / MILLI),
            ]
        if told is not None:
            numbers.append(("keys", "Committed keys in the registry, counted twice a minute.", told.keys))
            yield from service_metrics(told.service, "keyquorum_balancer")
        for name, text, value in numbers:
            yield GaugeMetricFamily(f"keyquorum_balancer_{name}", text, value)

    def _work(self) -> Iterator[Metric]:
        work = self._pages.loop.work
        yield SummaryMetricFamily(
            "keyquorum_balancer_tick_duration_seconds", "The rounds of the control loop.", work.ticks, work.seconds
        )
        yield CounterMetricFamily("keyquorum_balancer_failures", "What failed in the control loop.", work.failures)
        age_s = time.monotonic() - work.ended_s
        yield GaugeMetricFamily("keyquorum_balancer_tick_age_seconds", "Since the last round ended.", age_s)

    def _moves(self) -> Iterator[Metric]:
        told = self._pages.loop.progress
        waiting = GaugeMetricFamily("keyquorum_balancer_keys_waiting", "Keys that wait for new shares.", labels=["why"])
        goes = GaugeMetricFamily("keyquorum_balancer_keys_under_way", "Those that are being changed.", labels=["why"])
        done = CounterMetricFamily("keyquorum_balancer_keys_changed", "Keys that got new shares.", labels=["why"])
        failed = CounterMetricFamily("keyquorum_balancer_key_changes_failed", "Tries that failed.", labels=["why"])
        for family, counts in (
            (waiting, told.waiting), (goes, told.under_way), (done, told.done), (failed, told.failed),
        ):  # fmt: skip
            for kind in Kind:
                family.add_metric([kind.word], counts.get(kind, 0))
            yield family
        for name, text, value in (
            ("pace_per_second", "Keys a second that may be changed now.", told.keys_per_s),
            ("strain_ratio", "How many times as long as usual requests take.", told.strain),
        ):
            yield GaugeMetricFamily(f"keyquorum_balancer_moving_{name}", text, value)

    def _nodes(self, view: View) -> Iterator[Metric]:
        up = GaugeMetricFamily("keyquorum_balancer_node_up", "1 if the node answers, else 0.", labels=["node"])
        queue = GaugeMetricFamily("keyquorum_balancer_node_queue", "Requests that the node has.", labels=["node"])
        price = GaugeMetricFamily(
            "keyquorum_balancer_node_price", "Seconds that others wait for one second of its work.", labels=["node"]
        )
        for at, name in enumerate(view.snapshot.nodes):
            up.add_metric([name], int(view.snapshot.up[at]))
            queue.add_metric([name], view.snapshot.queue[at])
        table = self._standing.table
        for name, value in zip(table.nodes, table.price, strict=True) if table is not None else ():
            price.add_metric([name], value / MILLI)
        yield from (up, queue, price)

    def _load(self, view: View) -> Iterator[Metric]:
        load = GaugeMetricFamily(
            "keyquorum_balancer_load_per_second", "Requests per second in the last tick.", labels=["class"]
        )
        mean = GaugeMetricFamily(
            "keyquorum_balancer_forecast_per_second", "Expected requests per second.", labels=["class", "horizon"]
        )
        p90 = GaugeMetricFamily(
            "keyquorum_balancer_forecast_p90_per_second",
            "What they should stay below nine times in ten.",
            labels=["class", "horizon"],
        )
        outlook, now = view.forecast.outlook, loads(view)
        for at, name in enumerate(view.snapshot.classes):
            load.add_metric([name], float(now[at]))
            for horizon, column in HORIZONS_TOLD:
                mean.add_metric([name, str(horizon)], float(outlook.mean[at, column]))
                p90.add_metric([name, str(horizon)], float(outlook.p90[at, column]))
        yield from (load, mean, p90)

    def _errors(self, view: View) -> Iterator[Metric]:
        """What is not known yet has no sample."""
        told = accuracy(view.forecast.state.classes)
        for name, text, values in (
            ("error_ratio", "Mean absolute error over that of saying the last count again.", told.mase),
            ("coverage_ratio", "How often the load stayed below the P90.", told.coverage),
            ("bias_ratio", "Mean error over the load, above 0 where too much was forecast.", told.bias),
        ):
            family = GaugeMetricFamily(f"keyquorum_balancer_forecast_{name}", text, labels=["class", "horizon"])
            for row, series in enumerate(told.series):
                for horizon, column in HORIZONS_TOLD:
                    if np.isfinite(values[row, column]):
                        family.add_metric([str(series), str(horizon)], float(values[row, column]))
            yield family
