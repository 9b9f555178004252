"""The settings of a broker: which listeners it opens, its `server.properties`, and what clients need to connect."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from keven_core.testing._broker_process.tls import ServerCertificate, ThrowAwayCa

__all__ = ["HOST", "SECURITY_KINDS", "Listener", "NodeSettings", "client_properties", "server_properties"]

HOST = "127.0.0.1"
"""Brokers listen on loopback only."""

SECURITY_KINDS = {"sasl": "SASL_PLAINTEXT", "oauthbearer": "SASL_PLAINTEXT", "ssl": "SSL", "sasl_ssl": "SASL_SSL"}
"""Extra listeners a test can ask for, with the security protocol that each speaks."""

_PASSWORD_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_LOGIN = "org.apache.kafka.common.security"


@dataclass(frozen=True)
class Listener:
    """One port of one broker.

    Attributes:
        name: as in `listeners`, e.g. "PLAINTEXT".
        protocol: "PLAINTEXT", "SSL", "SASL_PLAINTEXT" or "SASL_SSL".
        port: on which the broker listens, on 127.0.0.1.
        advertised_port: which it tells clients to connect to; another one than `port` when a proxy stands in front.
    """

    name: str
    protocol: str
    port: int
    advertised_port: int


@dataclass(frozen=True)
class NodeSettings:
    """What differs from node to node.

    Attributes:
        node_id: from 1.
        folder: the node's own folder.
        controller_port: for KRaft's quorum.
        listeners: for clients; the one named `inter_broker` also serves the other brokers.
        inter_broker: name of that listener.
    """

    node_id: int
    folder: Path
    controller_port: int
    listeners: Sequence[Listener]
    inter_broker: str

    @property
    def data_folder(self) -> Path:
        """Where the node keeps its log segments."""
        return self.folder / "data"

    @property
    def properties(self) -> Path:
        """Its settings file."""
        return self.folder / "server.properties"


def server_properties(
    node: NodeSettings,
    controllers: Mapping[int, int],
    *,
    auto_create_topics: bool,
    users: Mapping[str, str],
    certificate: ServerCertificate | None,
    extra: Mapping[str, object],
) -> str:
    """Return the text of a node's `server.properties`.

    Args:
        node: the node.
        controllers: node id to controller port, of all nodes.
        auto_create_topics: whether a client's question for an unknown topic creates it.
        users: name to password, for the SASL listeners.
        certificate: for the SSL listeners; None if there are none.
        extra: more broker settings; they win over everything set here.
    """
    count = len(controllers)
    replicas = min(3, count)
    in_sync = 2 if replicas == 3 else 1
    settings: dict[str, object] = {
        "process.roles": "broker,controller",
        "node.id": node.node_id,
        "controller.quorum.voters": ",".join(f"{node_id}@{HOST}:{port}" for node_id, port in controllers.items()),
        "controller.listener.names": "CONTROLLER",
        "listeners": ",".join(
            [f"{each.name}://{HOST}:{each.port}" for each in node.listeners]
            + [f"CONTROLLER://{HOST}:{node.controller_port}"]
        ),
        "advertised.listeners": ",".join(f"{each.name}://{HOST}:{each.advertised_port}" for each in node.listeners),
        "listener.security.protocol.map": ",".join(
            [f"{each.name}:{each.protocol}" for each in node.listeners] + ["CONTROLLER:PLAINTEXT"]
        ),
        "inter.broker.listener.name": node.inter_broker,
        "log.dirs": node.data_folder,
        "auto.create.topics.enable": str(auto_create_topics).lower(),
        # A test's first member should not wait 3 s for others to join.
        "group.initial.rebalance.delay.ms": 0,
        # Tests of lost members should not wait for the 6 s and 45 s that are the least allowed by default. This is
        # only what a client (classic protocol) or a group's settings (KIP-848) may ask for; the defaults stay.
        "group.min.session.timeout.ms": 1000,
        "group.consumer.min.session.timeout.ms": 1000,
        "group.consumer.min.heartbeat.interval.ms": 500,
        # After kill -9 a node is let in again, and its partitions get another leader, only when its old session is
        # over: 9 s by default. Three JVMs on two cores need some air to keep their sessions while they start.
        "broker.session.timeout.ms": 3000 if count == 1 else 6000,
        "broker.heartbeat.interval.ms": 500 if count == 1 else 1000,
        "default.replication.factor": replicas,
        "min.insync.replicas": in_sync,
        "offsets.topic.replication.factor": replicas,
        "transaction.state.log.replication.factor": replicas,
        "transaction.state.log.min.isr": in_sync,
        "share.coordinator.state.topic.replication.factor": replicas,
        "share.coordinator.state.topic.min.isr": in_sync,
        # The first consumer and the first transaction wait until these exist; 50 each by default.
        "offsets.topic.num.partitions": 8,
        "transaction.state.log.num.partitions": 8,
        "share.coordinator.state.topic.num.partitions": 8,
    }
    settings |= _security(node.listeners, users, certificate)
    settings |= extra
    return "".join(f"{key}={_escaped(value)}\n" for key, value in settings.items())


def _security(
    listeners: Iterable[Listener], users: Mapping[str, str], certificate: ServerCertificate | None
) -> dict[str, object]:
    settings: dict[str, object] = {}
    accounts = " ".join(f'user_{name}="{password}"' for name, password in users.items())
    for listener in listeners:
        prefix = f"listener.name.{listener.name.lower()}"
        if listener.name == "OAUTHBEARER":
            # Kafka's own validator for unsigned tokens. A broker needs a token itself, although it is never used.
            settings[f"{prefix}.sasl.enabled.mechanisms"] = "OAUTHBEARER"
            settings[f"{prefix}.oauthbearer.sasl.jaas.config"] = (
                f'{_LOGIN}.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="broker";'
            )
        elif listener.protocol.startswith("SASL"):
            settings[f"{prefix}.sasl.enabled.mechanisms"] = ",".join(_PASSWORD_MECHANISMS)
            settings[f"{prefix}.plain.sasl.jaas.config"] = f"{_LOGIN}.plain.PlainLoginModule required {accounts};"
            for mechanism in ("scram-sha-256", "scram-sha-512"):
                settings[f"{prefix}.{mechanism}.sasl.jaas.config"] = f"{_LOGIN}.scram.ScramLoginModule required;"
        if listener.protocol.endswith("SSL"):
            assert certificate is not None
            settings |= {
                f"{prefix}.ssl.keystore.type": "PKCS12",
                f"{prefix}.ssl.keystore.location": certificate.keystore,
                f"{prefix}.ssl.keystore.password": certificate.password,
                f"{prefix}.ssl.key.password": certificate.password,
                f"{prefix}.ssl.truststore.type": "PKCS12",
                f"{prefix}.ssl.truststore.location": certificate.truststore,
                f"{prefix}.ssl.truststore.password": certificate.password,
                # A client may show a certificate (mutual TLS) and need not.
                f"{prefix}.ssl.client.auth": "requested",
            }
    return settings


def _escaped(value: object) -> str:
    """Escape as java.util.Properties reads it: a backslash and the blanks at the front would be lost."""
    text = str(value).replace("\\", "\\\\").replace("\n", "\\n")
    return "\\" + text if text.startswith(" ") else text


def client_properties(
    kind: str,
    bootstrap_servers: str,
    *,
    mechanism: str,
    user: tuple[str, str],
    certificate_authority: ThrowAwayCa | None,
) -> dict[str, str]:
    """Return the settings with which a librdkafka client connects to a listener of that kind.

    Args:
        kind: "plaintext" or a key of `SECURITY_KINDS`.
        bootstrap_servers: addresses of the listeners of that kind.
        mechanism: "PLAIN", "SCRAM-SHA-256" or "SCRAM-SHA-512"; for "sasl" and "sasl_ssl" only.
        user: name and password.
        certificate_authority: whose certificate the client trusts, for "ssl" and "sasl_ssl".
    """
    settings = {
        "bootstrap.servers": bootstrap_servers,
        "security.protocol": SECURITY_KINDS.get(kind, "PLAINTEXT").lower(),
    }
    if kind == "oauthbearer":
        settings |= {
            "sasl.mechanism": "OAUTHBEARER",
            "enable.sasl.oauthbearer.unsecure.jwt": "true",
            "sasl.oauthbearer.config": f"principal={user[0]}",
        }
    elif kind.startswith("sasl"):
        settings |= {"sasl.mechanism": mechanism, "sasl.username": user[0], "sasl.password": user[1]}
    if certificate_authority is not None and kind in {"ssl", "sasl_ssl"}:
        settings["ssl.ca.location"] = str(certificate_authority.ca_pem)
    return settings
