# SPDX-License-Identifier: Apache-2.0
"""A registration, decoded from the plugin's message into the daemon's values; and back, for the record of it."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from cni_plugin import messages
from enforcer_daemon.model import AttachmentId, IPAddress, PodRef


@dataclass(frozen=True, slots=True)
class AddRequest:
    """What the plugin says of a pod's interface that is to be enforced."""

    attachment: AttachmentId
    netns_path: str
    """Where the runtime mounted the namespace: it vanishes with the pod. Open namespaces by descriptor, not by it."""
    network: str
    """The conflist's name."""
    pod: PodRef
    uid: str
    """As in the runtime's K8S_POD_UID, empty if it gave none; for a static pod not the UID of its mirror."""
    labels: Mapping[str, str]
    """The runtime's labels, where it passes any: the pod object's come first."""
    ips: tuple[IPAddress, ...]
    """The pod's addresses on this interface; never empty."""
    host_interfaces: tuple[str, ...]
    """The attachment's ends in the node's namespace, as the primary plugin named them."""
    mtu: int | None
    """Of the pod's interface, bytes; None if the result did not say."""


def decode_attachment(attachment: messages.Attachment) -> AttachmentId:
    """Turn the message's attachment into the daemon's key."""
    return AttachmentId(attachment.container_id, attachment.ifname)


def encode_attachment(attachment: AttachmentId) -> messages.Attachment:
    """Turn the daemon's key into the message's attachment."""
    return messages.Attachment(attachment.container_id, attachment.ifname)


def decode_add(message: messages.Add) -> AddRequest:
    """Turn the message into values; raise MessageError that names the field."""
    if not message.ips:
        raise messages.MessageError("ips: must not be empty")
    for index, name in enumerate(message.host_interfaces):
        if fault := messages.ifname_fault(name):
            raise messages.MessageError(f"hostInterfaces[{index}]: {fault}")
    return AddRequest(
        attachment=decode_attachment(message.attachment),
        netns_path=message.netns_path,
        network=message.network,
        pod=PodRef(message.namespace, message.pod),
        uid=message.uid,
        labels=message.labels,
        ips=tuple(_decode_ip(text, f"ips[{index}]") for index, text in enumerate(message.ips)),
        host_interfaces=message.host_interfaces,
        mtu=message.mtu,
    )


def encode_add(request: AddRequest) -> messages.Add:
    """Turn the values back into the message."""
    return messages.Add(
        attachment=encode_attachment(request.attachment),
        netns_path=request.netns_path,
        network=request.network,
        namespace=request.pod.namespace,
        pod=request.pod.name,
        uid=request.uid,
        labels=dict(request.labels),
        ips=tuple(str(ip) for ip in request.ips),
        host_interfaces=request.host_interfaces,
        mtu=request.mtu,
    )


def _decode_ip(text: str, path: str) -> IPAddress:
    if "%" in text:
        raise messages.MessageError(f"{path}: an address with a zone is known on one node only")
    try:
        return ipaddress.ip_address(text)
    except ValueError as err:
        raise messages.MessageError(f"{path}: {err}") from err
