"""AIME's endpoint files, `<folder>/aime_api_endpoint.cfg`: a table of theirs → a table of ours. Pure.

Decides what of such a file has a meaning here, and names what has none, so that nobody believes it is served. Leaves to endpoints.py what a
table may hold.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

FILE_NAME = "aime_api_endpoint.cfg"

_ENDPOINT = {
    "name": "name",
    "title": "title",
    "description": "description",
    "version": "version",
    "category": "category",
    "max_queue_length": "max_waiting",
    "max_time_in_queue": "queue_timeout_s",
    "result_lifetime": "keep_s",
}
_ENDPOINT_IGNORED = {"methods", "demo_url", "job_inactivity_timeout", "input_metering", "output_metering"}
"""Both methods are always served; a page has its own address; silence stands with the worker's terms; nothing is metered by input."""
_INPUT = ("type", "required", "default", "auto_convert", "align", "max_length", "supported")
_SECTIONS = {"ENDPOINT", "WORKER", "CLIENTS", "INPUTS", "OUTPUTS", "PROGRESS"}
_MEDIA = ("image", "audio", "video")


def table_of(text: str) -> tuple[dict[str, Any], list[str]]:
    """A table for EndpointConfig, and a word for each thing that is not served. Raises tomllib.TOMLDecodeError."""
    given = tomllib.loads(text)
    unserved = [f"[{name}]" for name in given if name not in _SECTIONS]
    endpoint, worker, clients = (_table(given, name) for name in ("ENDPOINT", "WORKER", "CLIENTS"))
    unserved += [f"ENDPOINT.{name}" for name in endpoint if name not in _ENDPOINT and name not in _ENDPOINT_IGNORED]
    table: dict[str, Any] = {ours: endpoint[theirs] for theirs, ours in _ENDPOINT.items() if theirs in endpoint}
    table["worker"] = _worker(worker, endpoint)
    table["clients"] = {name: clients[name] for name in ("authorization_keys", "provide_worker_meta_data") if name in clients}
    unserved += [f"CLIENTS.{name}" for name in clients if name not in table["clients"]]
    table["inputs"] = {name: _input(name, one, unserved) for name, one in _table(given, "INPUTS").items()}
    table["outputs"] = _table(given, "OUTPUTS")
    table["progress_outputs"] = _table(_table(given, "PROGRESS"), "OUTPUTS")
    return table, unserved


def _table(tables: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = tables.get(name, {})
    return found if isinstance(found, dict) else {}


def _worker(worker: Mapping[str, Any], endpoint: Mapping[str, Any]) -> dict[str, Any]:
    terms = {name: worker[name] for name in ("job_type", "auth_key") if name in worker}
    if "request_timeout" in worker:
        terms["request_timeout_s"] = worker["request_timeout"]
    if "job_inactivity_timeout" in endpoint:
        terms["job_silence_s"] = endpoint["job_inactivity_timeout"]
    return terms


def _input(name: str, given: Any, unserved: list[str]) -> Any:
    if not isinstance(given, dict):
        return given
    known = {one: given[one] for one in _INPUT if one in given}
    for ours, names in (("minimum", ("minimum", "min")), ("maximum", ("maximum", "max"))):
        known.update((ours, given[one]) for one in names if one in given)
    if given.get("type") in _MEDIA:
        # what ffmpeg would convert passes through, so only the formats that are taken as they are mean something
        media_format = given.get("format")
        if isinstance(media_format, dict) and media_format.get("supported") and not media_format.get("auto_convert"):
            known["supported"] = media_format["supported"]
        unserved += [f"conversion of {name}.{one}" for one in given if isinstance(given[one], dict) and one != "format"]
        if isinstance(media_format, dict) and media_format.get("auto_convert"):
            unserved.append(f"conversion of {name}.format")
        known.pop("auto_convert", None)
    return known
