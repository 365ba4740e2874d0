"""Requests to a Kubernetes API by httpx, with its refusals as errors of ours. See `jaxlm.launch.kubernetes`."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any

import httpx

from jaxlm.errors import InputError, JaxlmError, UnavailableError

REQUEST_SECONDS = 30.0
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class ForbiddenError(InputError):
    """The API does not let us. While a job runs that may pass: a login has expired, a role is being changed."""


class KubernetesApi:
    """An API, at `url` or, where that is empty, that of the cluster whose pod this is, by the account in `account`."""

    def __init__(self, url: str, account: Path) -> None:
        self._url, self._account = url, account

    def request(self, method: str, path: str, *, accept: tuple[int, ...] = (), **given: Any) -> dict[str, Any]:
        """The JSON of an answer, or of one of the refusals in `accept`."""
        response = self.send(method, path, accept=accept, **given)
        try:
            value = response.json()
        except ValueError:
            value = None
        if response.status_code == 404 and value is None:  # the path itself is unknown, not an object under it
            raise _refused(response, path)
        if not isinstance(value, dict):
            raise UnavailableError(f"{self._base()}: this does not answer as a Kubernetes API does.")
        return value

    def send(self, method: str, path: str, *, accept: tuple[int, ...] = (), **given: Any) -> httpx.Response:
        """An answer, or one of the refusals in `accept`.

        Raises:
            InputError: the API refused; ForbiddenError: it does not let us.
            UnavailableError: it is away.
        """
        token = self._account / "token"
        headers = {}
        verify: Any = True
        if not self._url:
            try:
                headers["Authorization"] = f"Bearer {token.read_text().strip()}"  # read anew: tokens are replaced
            except OSError:
                raise InputError(
                    "launch.kubernetes.api: empty, and this is no pod of a cluster; start kubectl proxy and set it to "
                    "http://127.0.0.1:8001."
                ) from None
            verify = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
        try:
            with httpx.Client(base_url=self._base(), verify=verify, timeout=REQUEST_SECONDS) as client:
                response = client.request(method, path, headers=headers, **given)
        except httpx.HTTPError as error:
            raise UnavailableError(f"{self._base()}: the Kubernetes API is away ({error}).") from None
        if response.is_success or response.status_code in accept:
            return response
        raise _refused(response, path)

    def _base(self) -> str:
        if self._url:
            return self._url
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST", "kubernetes.default.svc"), "443"
        return f"https://{host}:{os.environ.get('KUBERNETES_SERVICE_PORT', port)}"


def _refused(response: httpx.Response, path: str) -> JaxlmError:
    """A refusal of the API as an error of ours."""
    try:
        message = str(response.json().get("message", ""))
    except (ValueError, AttributeError):
        message = response.text
    said = " ".join(message.split())[:300] or response.reason_phrase
    code = response.status_code
    if code >= 500 or code in (408, 429):
        return UnavailableError(f"the Kubernetes API is away ({code}: {said}).")
    if code in (401, 403):
        return ForbiddenError(
            f"launch.kubernetes: the API does not let us ({said}); see docs/clusters.md for the role."
        )
    if code == 404 and "/jobsets" in path:
        return InputError(f"launch.kubernetes: the cluster has no API for JobSets ({said}); install JobSet.")
    return InputError(f"launch.kubernetes: the API refused the job ({said}); correct the settings or the template.")
