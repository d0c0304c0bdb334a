"""What a run talks to outside the cluster: Weights & Biases and the Hugging Face Hub. It trains without either."""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
from typing import Any

from distft.doctor.bounded import why
from distft.doctor.verdict import OK, SKIPPED, WARN, Verdict

ANSWER_SECONDS = 10.0
WHO = '{"query": "query Viewer { viewer { username entity } }"}'


def tracker(kind: str) -> list[Verdict]:
    """Whether `log=wandb` will send its records, tried with the key that W&B itself would take."""
    if kind != "wandb":
        return [Verdict("tracker", SKIPPED, f"log={kind} needs no server")]
    from distft.log.wandb import credentials

    address, key = credentials()
    if address is None:
        return [Verdict("tracker", OK, "W&B is switched off (WANDB_MODE)")]
    if key is None:
        return [Verdict("tracker", OK, f"no key for {address}: runs are recorded offline (`wandb login` stores a key)")]
    status, answer = ask(f"{address}/graphql", WHO, key)
    return [judge_answer(address, status, answer)]


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key goes to the server that it was asked for, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


def ask(address: str, body: str | None, key: str | None = None) -> tuple[int, str]:
    """The status of an HTTP answer and its text; status 0 and the reason where there is none."""
    headers = {"Content-Type": "application/json", "User-Agent": "distft"}
    if key:
        headers["Authorization"] = "Basic " + base64.b64encode(f"api:{key}".encode()).decode()
    if not address.startswith(("http://", "https://")):
        return 0, f"{address.partition(':')[0]} is no web address"
    try:
        request = urllib.request.Request(address, body.encode() if body else None, headers)
        with urllib.request.build_opener(NoRedirect).open(request, timeout=ANSWER_SECONDS) as answer:
            return int(answer.status), answer.read(1 << 16).decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, ""
    except urllib.error.URLError as error:
        return 0, why(error.reason) if isinstance(error.reason, Exception) else str(error.reason)
    except (OSError, ValueError) as error:
        return 0, why(error)


def judge_answer(address: str, status: int, answer: str) -> Verdict:
    """What W&B's server said to the question who the key belongs to."""
    offline = "Runs are recorded offline; send them later with `wandb sync`."
    if status in (401, 403):
        return Verdict("tracker", WARN, f"{address} does not accept the key", f"`wandb login` takes another. {offline}")
    if status != 200:
        said = f"{address} cannot be reached ({answer})" if status == 0 else f"{address} answers with status {status}"
        return Verdict("tracker", WARN, said, f"Look at the proxy and WANDB_BASE_URL. {offline}")
    try:
        viewer: Any = json.loads(answer)["data"]["viewer"]
    except (ValueError, KeyError, TypeError):
        return Verdict("tracker", WARN, f"{address} answers, but not as W&B does", f"Look at WANDB_BASE_URL. {offline}")
    if not viewer:
        return Verdict("tracker", WARN, f"{address} does not know the key", f"`wandb login` takes another. {offline}")
    return Verdict("tracker", OK, f"{address} accepts the key of {viewer.get('username') or viewer.get('entity')}")


def hub() -> list[Verdict]:
    """Whether models and data can be fetched by their names."""
    cure = "Name folders in model.path and data.path; HF_ENDPOINT and HTTPS_PROXY lead elsewhere."
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return [Verdict("hub", SKIPPED, "HF_HUB_OFFLINE is set: nothing is fetched")]
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    status, answer = ask(f"{address}/api/models?limit=1", None)
    if 200 <= status < 400:
        return [Verdict("hub", OK, f"{address} answers")]
    said = f"{address} cannot be reached ({answer})" if status == 0 else f"{address} answers with status {status}"
    return [Verdict("hub", WARN, said, cure)]
