"""What a node counts, for Prometheus: over HTTP, on a port of its own, by threads that never touch what is the loop's.

Each scrape asks the loop for one snapshot. Labels are request classes, stages, caches and the like: their number is
bounded, and none is a key's or a member's name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Final

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.client.httpconfig import HttpConfig
from engine.client.web import Answer, WebServer, metrics_answer, service_metrics, text_answer
from nodes.handlers import Snapshot

__all__ = ["BOUNDS_S", "MetricsServer"]

BOUNDS_S: Final = tuple(digit * 10.0**power for power in range(-6, 2) for digit in (1, 2.5, 5))[:-2]
"""Upper bounds of the buckets, in seconds: 1 microsecond to 10 s."""
PATH: Final = "/metrics"
SNAPSHOT_TIMEOUT_S: Final = 2.0
EVICTIONS: Final = ("ttl", "uses", "room", "changed", "flushed")


class _Metrics(Collector):
    """One snapshot in Prometheus' words."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        yield from self._requests()
        yield from self._caches()
        yield from self._numbers()

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("keyquorum_requests", "Requests that were answered.", labels=["class"])
        errors = CounterMetricFamily("keyquorum_request_errors", "Requests not answered with ok.", labels=["class"])
        whole = HistogramMetricFamily(
            "keyquorum_request_duration_seconds", "From the request that was read to its reply.", labels=["class"]
        )
        stages = HistogramMetricFamily(
            "keyquorum_stage_duration_seconds", "The stages of requests.", labels=["class", "stage"]
        )
        for each in self._snapshot.latencies:
            buckets = [(f"{bound:g}", float(count)) for bound, count in zip(BOUNDS_S, each.counts, strict=True)]
            buckets.append(("+Inf", float(each.count)))
            if each.stage == "total":
                requests.add_metric([each.request_class], each.count)
                errors.add_metric([each.request_class], self._snapshot.errors[each.request_class])
                whole.add_metric([each.request_class], buckets, each.sum_s)
            else:
                stages.add_metric([each.request_class, each.stage], buckets, each.sum_s)
        yield from (requests, errors, whole, stages)

    def _caches(self) -> Iterator[Metric]:
        entries = GaugeMetricFamily("keyquorum_cache_entries", "What a cache holds.", labels=["cache"])
        size = GaugeMetricFamily("keyquorum_cache_bytes", "Bytes of what a cache holds.", labels=["cache"])
        hits = CounterMetricFamily("keyquorum_cache_hits", "Found in a cache.", labels=["cache"])
        misses = CounterMetricFamily("keyquorum_cache_misses", "Not found in a cache.", labels=["cache"])
        left = CounterMetricFamily(
            "keyquorum_cache_evictions", "What left a cache, and why.", labels=["cache", "reason"]
        )
        for each in self._snapshot.status.caches:
            entries.add_metric([each.cache], each.entries)
            size.add_metric([each.cache], each.bytes)
            hits.add_metric([each.cache], each.hits)
            misses.add_metric([each.cache], each.misses)
            for reason in EVICTIONS:
                left.add_metric([each.cache, reason], getattr(each, reason))
        yield from (entries, size, hits, misses, left)

    def _numbers(self) -> Iterator[Metric]:
        status = self._snapshot.status
        health = status.health
        yield from service_metrics(status.service, "keyquorum")
        waiting = GaugeMetricFamily("keyquorum_jobs_waiting", "Jobs that wait for a worker.", labels=["worker"])
        for worker, count in self._snapshot.waiting.items():
            waiting.add_metric([worker], count)
        yield waiting
        info = GaugeMetricFamily("keyquorum_build_info", "Always 1.", labels=["version"])
        info.add_metric([status.software], 1)
        yield info
        serves = not (health.problem or status.audit or status.store)
        for name, text, value in (
            ("uptime_seconds", "Since the node started.", status.uptime_ms / 1000),
            ("ready", "1 if the token, the audit log and the store are as they must be, else 0.", int(serves)),
            ("alarms", "Contradictions in audit logs that were seen.", len(status.alarms)),
            ("cluster_serial", "Serial of the cluster manifest in force.", status.cluster_serial),
            ("shares", "Shares of live keys that are held.", status.shares),
            ("loaded_keys", "Keys in the token.", status.loaded),
            ("token_canary_age_seconds", "Since the node found its token well.", health.canary_age_ms / 1000),
            ("token_fresh_age_seconds", "Since a fresh process found it well.", health.fresh_age_ms / 1000),
        ):
            yield GaugeMetricFamily(f"keyquorum_{name}", text, value)
        for name, text, value in (
            ("token_renewals", "How often the token was opened anew.", health.renewals),
            ("token_objects_made", "Objects made in the token.", health.made),
        ):
            yield CounterMetricFamily(f"keyquorum_{name}", text, value)


class MetricsServer:
    """Answers ``GET /metrics`` until it is closed; ``EngineError`` if it can't listen.

    ``ask`` has the loop make a snapshot with these bounds, and give it to a callback, which it calls in its own thread.
    """

    def __init__(self, config: HttpConfig, ask: Callable[[Callable[[Snapshot], None]], None]) -> None:
        self._ask = ask
        self._server = WebServer(config, "metrics", {PATH: self._page})

    def close(self) -> None:
        """Listen no more."""
        self._server.close()

    def _page(self, accept: str) -> Answer:
        snapshot = self._snapshot()
        if snapshot is None:
            return text_answer("the node is busy", HTTPStatus.SERVICE_UNAVAILABLE)
        return metrics_answer(_Metrics(snapshot), accept)

    def _snapshot(self) -> Snapshot | None:
        given: list[Snapshot] = []
        done = threading.Event()

        def take(snapshot: Snapshot) -> None:
            given.append(snapshot)
            done.set()

        self._ask(take)
        return given[0] if done.wait(SNAPSHOT_TIMEOUT_S) else None
