"""Keeps schemathesis on this machine, and leads it to what there is.

What it makes up names no VM and no image that exists, so it would only ever see refusals. And some of what it may ask for
reaches out: registries, mirrors, apt. Every second request is led to the VM and the image that the test has made, and
whatever would reach out is led to a port of this machine at which nobody listens.
"""

import io
import itertools
import json
import os
import tarfile

import schemathesis

VM = os.environ.get("OFFSHOOT_TEST_VM", "nobody")
NAME = os.environ.get("OFFSHOOT_TEST_VM_NAME", "nobody")
IMAGE = os.environ.get("OFFSHOOT_TEST_IMAGE", "nothing:1")
CLOSED = "127.0.0.1:9"
# These would boot VMs, whose ends other requests then wait for.
STARTS = {("POST", "/v1/vms/{vm}/start"), ("POST", "/v1/vms/{vm}/restart")}
# And these would leave nothing to ask.
TAKES_AWAY = {("DELETE", "/v1/vms/{vm}"), ("POST", "/v1/vms/{vm}/rename")}

turns = itertools.count()


@schemathesis.hook
def before_call(context, case, kwargs):
    path, method = case.operation.path, case.method.upper()
    led = next(turns) % 2 == 0
    parameters = case.path_parameters
    if isinstance(parameters, dict) and "vm" in parameters:
        if (method, path) in STARTS:
            # What was made up is tried as it is; the ids of VMs that it has seen are not.
            if str(parameters["vm"]).isalnum():
                parameters["vm"] = "nobody"
        elif (method, path) in TAKES_AWAY:
            if parameters["vm"] in (VM, NAME):
                parameters["vm"] = "nobody"
        elif led:
            parameters["vm"] = VM
    query = case.query
    if led and isinstance(query, dict) and "reference" in query and (method, path) != ("DELETE", "/v1/images"):
        query["reference"] = IMAGE
    if path == "/v1/events" and isinstance(query, dict) and str(query.get("follow")).lower() == "true":
        # It would go on until somebody goes away.
        query["follow"] = False
    body = case.body
    if not isinstance(body, dict):
        return
    if (method, path) == ("POST", "/v1/vms") and led and isinstance(body.get("image"), str):
        body["image"] = IMAGE
    if path == "/v1/images/warm" and isinstance(body.get("slots"), int) and 0 < body["slots"] <= 64:
        # These would boot VMs, too.
        body["slots"] = 0
    if path == "/v1/images/pull" and isinstance(body.get("reference"), str):
        body["reference"] = f"{CLOSED}/{body['reference']}"
    if path == "/v1/images/bootstrap" and isinstance(body.get("recipe"), str):
        # What is no mirror at all is refused as that.
        if body.get("mirror") is None or isinstance(body.get("mirror"), str) and led:
            body["mirror"] = f"http://{CLOSED}/debian"
    if path == "/v1/kernels/distro" and body.get("package") is None:
        body["package"] = "linux-image-0.0.0-none"


@schemathesis.serializer("application/x-tar")
def tar(context, value):
    """A tar with what was made up in one file, or just that."""
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    if next(turns) % 2 == 0:
        return content
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as file:
        entry = tarfile.TarInfo("vmlinux")
        entry.size = len(content)
        file.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


@schemathesis.deserializer("application/x-ndjson")
def last_line(context, response):
    """The document describes one line; the last one is the result."""
    lines = response.content.splitlines()
    if not lines and "/v1/events" in response.request.url:
        # No event fits: there is nothing to compare.
        return {"seq": 0, "time_ms": 0, "action": "create", "reason": ""}
    return json.loads(lines[-1])
