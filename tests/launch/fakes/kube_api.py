"""A Kubernetes API with JobSet, on loopback, as far as jaxlm uses it: its pods are processes of this machine.

Answers and refusals are `Status` objects with the codes and reasons of the API's documentation; JobSet's conditions
(Completed, Failed, Suspended) and the label of its pods are those of jobset.sigs.k8s.io v1alpha2.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse


class Pod:
    def __init__(self, name, jobset, spec, index, count, log):
        self.name, self.jobset = name, jobset
        container = spec["containers"][0]
        env = dict(os.environ)
        for variable in container.get("env", []):
            env[variable["name"]] = variable.get("value", str(index))
        if count > 1:
            env["JAXLM_COORDINATOR"] = "127.0.0.1:0"
        self.log = open(log, "w+b")  # noqa: SIM115, closed by end()
        self.process = subprocess.Popen(
            container["command"], env=env, stdout=self.log, stderr=self.log, start_new_session=True
        )
        self.disrupted = False

    def to_json(self, waiting):
        code = self.process.poll()
        state = {"running": {}} if code is None else {"terminated": self._terminated(code)}
        if waiting:
            state = {"waiting": waiting}
        phase = "Pending" if waiting else "Running" if code is None else "Succeeded" if code == 0 else "Failed"
        status = {"phase": phase, "containerStatuses": [{"name": "stage", "state": state}], "conditions": []}
        if self.disrupted:
            status["conditions"].append(
                {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
            )
        labels = {"jobset.sigs.k8s.io/jobset-name": self.jobset}
        return {"metadata": {"name": self.name, "labels": labels}, "status": status}

    def _terminated(self, code):
        exit_code = code if code >= 0 else 128 - code
        reason = "Completed" if code == 0 else "OOMKilled" if exit_code == 137 else "Error"
        return {"exitCode": exit_code, "reason": reason, "finishedAt": "2026-01-01T00:00:00Z"}

    def end(self):
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


class KubeApi:
    """Attributes that a test sets: installed, refusal (code, reason, message), waiting (of containers), suspended."""

    def __init__(self, directory):
        self.directory = directory
        self.jobsets, self.pods, self.failed, self.requests = {}, {}, set(), []
        self.installed, self.suspended = True, False
        self.refusal = self.waiting = None
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                api.handle(self, None)

            def do_POST(self):
                api.handle(self, self._body())

            def do_DELETE(self):
                api.handle(self, self._body())

            def _body(self):
                return json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def stop(self):
        for pods in self.pods.values():
            for pod in pods:
                pod.end()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def handle(self, request, body):
        url = urlparse(request.path)
        self.requests.append((request.command, url.path, request.headers.get("Authorization")))
        code, answer = self.refused() or self.answer(request.command, url.path, parse_qs(url.query), body)
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        request.send_response(code)
        request.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def refused(self):
        return self.refusal and (self.refusal[0], status(*self.refusal))

    def answer(self, method, path, query, body):
        parts = path.strip("/").split("/")
        if parts[:2] == ["apis", "jobset.x-k8s.io"]:
            if not self.installed:
                return 404, "404 page not found\n"
            name = parts[6] if len(parts) > 6 else None
            return {"POST": self.create, "GET": self.get, "DELETE": self.delete}[method](name, body)
        if parts[-1] == "pods":
            wanted = query["labelSelector"][0].partition("=")[2]
            return 200, {"kind": "PodList", "items": [p.to_json(self.waiting) for p in self.pods.get(wanted, [])]}
        if parts[-1] == "log":
            pod = next(p for pods in self.pods.values() for p in pods if p.name == parts[-2])
            pod.log.seek(0)
            return 200, pod.log.read().decode()
        return 404, status(404, "NotFound", path)

    def create(self, name, body):
        name = body["metadata"]["name"]
        if name in self.jobsets:
            return 409, status(409, "AlreadyExists", f'jobsets.jobset.x-k8s.io "{name}" already exists')
        job = body["spec"]["replicatedJobs"][0]["template"]["spec"]
        if not isinstance(job["completions"], int):
            return 422, status(422, "Invalid", f'JobSet "{name}" is invalid: spec: completions: must be an integer')
        self.jobsets[name] = body
        self.failed.discard(name)
        count = job["completions"]
        self.pods[name] = [
            Pod(
                f"{name}-workers-0-{k}-abcde",
                name,
                job["template"]["spec"],
                k,
                count,
                self.directory / f"{name}-{k}.log",
            )
            for k in range(count)
        ]
        return 201, body

    def get(self, name, body):
        if name not in self.jobsets:
            return 404, status(404, "NotFound", f'jobsets.jobset.x-k8s.io "{name}" not found')
        codes = [pod.process.poll() for pod in self.pods[name]]
        conditions = []
        if self.suspended:
            conditions = [{"type": "Suspended", "status": "True", "reason": "SuspendedJobs"}]
        elif any(codes) or name in self.failed:
            self.failed.add(name)
            for pod in self.pods[name]:
                if pod.process.poll() is None:
                    os.killpg(pod.process.pid, signal.SIGTERM)
            conditions = [{"type": "Failed", "status": "True", "reason": "FailedJobs"}]
        elif None not in codes:
            conditions = [{"type": "Completed", "status": "True", "reason": "AllJobsCompleted"}]
        return 200, {**self.jobsets[name], "status": {"conditions": conditions}}

    def delete(self, name, body):
        if name not in self.jobsets:
            return 404, status(404, "NotFound", f'jobsets.jobset.x-k8s.io "{name}" not found')
        assert body["propagationPolicy"] == "Foreground"

        def end():
            for pod in self.pods[name]:
                with suppress(OSError):
                    os.killpg(pod.process.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    pod.process.wait(20)
            self.jobsets.pop(name)
            for pod in self.pods.pop(name):
                pod.end()

        found = self.jobsets[name]
        if "deletionTimestamp" in found["metadata"]:
            return 200, found
        found["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        threading.Thread(target=end, daemon=True).start()
        return 200, found


def status(code, reason, message):
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }
