"""Daemons serve Prometheus metrics at the address that they print."""

from __future__ import annotations

import re
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import SPANS
from tests.e2e.daemons import Daemon

pytestmark = pytest.mark.e2e


def test_each_daemon_has_its_own_metrics(trio: list[Daemon]) -> None:
    told: list[str] = []
    for daemon in trio:
        (url,) = re.findall(r"^metrics at (http://127\.0\.0\.1:\d+/metrics)$", daemon.log, re.MULTILINE)
        with urllib.request.urlopen(url, timeout=10) as response:
            families = text_string_to_metric_families(response.read().decode())
        (info,) = (family for family in families if family.name == "splitnet_peer_info")
        told.append(info.samples[0].labels["blocks"])
    assert told == [f"{start}:{end}" for start, end in SPANS]
