"""The hub: whether it answers, whether it knows who asks, and what stands in between. Never the token itself."""

from __future__ import annotations

import os

from qlora.doctor.finding import Finding, green, red, yellow
from qlora.hub import Reach

PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_CERTIFICATES = "name your network's certificates in SSL_CERT_FILE"
_NO_ADDRESS = ("HF_ENDPOINT or HTTPS_PROXY is no address", "correct them, or unset them")
# What a client's error is called, and what helps.
_REASONS = (
    ("certificate", "its certificate is not trusted here", _CERTIFICATES),
    ("ProxyError", "the proxy refuses", "correct the proxy's address or password in HTTPS_PROXY"),
    ("Timeout", "it does not answer in time", "try again, or check the network"),
    ("UnsupportedProtocol", *_NO_ADDRESS),
    ("InvalidURL", *_NO_ADDRESS),
    ("ValueError", *_NO_ADDRESS),
)


def findings(reach: Reach) -> list[Finding]:
    """The line of the hub. Its address is not shown where it is somebody's own, nor a proxy's."""
    hub = "the hub" if reach.is_usual else "the hub of HF_ENDPOINT"
    by = f", by the proxy of {proxy}" if (proxy := next((name for name in PROXIES if os.environ.get(name)), "")) else ""
    if reach.is_offline:
        said = "HF_HUB_OFFLINE is set: only what lies in the cache is used, on purpose"
        return [yellow("hub", said, "unset HF_HUB_OFFLINE to download")]
    if reach.token == "malformed":
        return [red("hub", "its token has characters that no token has", "set HF_TOKEN anew, or: hf auth login")]
    if reach.status is None:
        found = (one for one in _REASONS if one[0].lower() in reach.failure.lower())
        _, why, mend = next(found, ("", f"no connection ({reach.failure})", "check the network"))
        said = f"{hub} cannot be reached{by}: {why}; folders and the cache are used"
        return [yellow("hub", said, mend)]
    if reach.token == "none":
        return [_without_token(reach, hub, by)]
    if reach.status in (401, 403):
        mend = "hf auth login, or correct HF_TOKEN"
        return [red("hub", f"{hub} answers{by}, and refuses the token: downloads of public models fail too", mend)]
    if reach.status != 200:
        return [yellow("hub", f"{hub} answers {reach.status}{by}", "try again later")]
    return [
        green(
            "hub", f"{hub} answers in {reach.seconds:.1f} s{by}, and knows the token", figures={"status": reach.status}
        )
    ]


def _without_token(reach: Reach, hub: str, by: str) -> Finding:
    """Asked who asks, a hub refuses those without a name: another answer is somebody else's."""
    if reach.status in (401, 403):
        said = f"{hub} answers in {reach.seconds:.1f} s{by}; no token, which gated models need (hf auth login)"
        return green("hub", said, figures={"status": reach.status})
    if reach.status == 200:
        return yellow("hub", f"something else answers in the hub's place{by}", "log in to this network by a browser")
    return yellow("hub", f"{hub} answers {reach.status}{by}", "try again later")
