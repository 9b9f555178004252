"""Real brokers started with Java, as child processes that a test may kill, pause and restart."""

import atexit
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from keven_core.testing._broker_process.cluster import KafkaCluster, wait_until_answering
from keven_core.testing._broker_process.errors import KafkaStartError, KafkaUnavailable
from keven_core.testing._broker_process.jars import fetch_jars, find_java, find_keytool, java_unavailable_reason
from keven_core.testing._broker_process.ports import PortReservation
from keven_core.testing._broker_process.process import BrokerProcess, log_tail, wait_until_stopped
from keven_core.testing._broker_process.settings import (
    HOST,
    SECURITY_KINDS,
    Listener,
    NodeSettings,
    client_properties,
    server_properties,
)
from keven_core.testing._broker_process.storage import broker_command, format_storage
from keven_core.testing._broker_process.tls import ServerCertificate, ThrowAwayCa
from keven_core.testing.proxy import FaultProxy

__all__ = ["RealKafka"]

_TERMINATE_TIMEOUT_S = 30.0
_PORT_ATTEMPTS = 3
_DEFAULT_USERS = {"keven": "keven-secret"}


class RealKafka(KafkaCluster):
    """A real Kafka cluster on loopback: one Java process per node, each both broker and controller (KRaft).

    `start` takes some 5 s. The first start of all fetches the broker's jars with Maven (8 s, 54 MB). The brokers end
    with this Python process, however it ends. Methods block and are called from one thread at a time. Nodes are
    numbered from 1. A process that was forked from this one may use the addresses, but not stop the cluster.

    Attributes:
        nodes: how many nodes.
        proxies: one `FaultProxy` in front of each node, in node order; empty unless `proxied`.

    Args:
        nodes: how many (1). From three on, internal topics have three replicas and need two in sync.
        data_dir: folder for data and logs, which stays after `stop` and is used again by the next start. None
            (default): a temporary folder, removed by `stop`.
        ports: the clients' ports, one per node; None, for one of them or for all (default): free ones between 20000
            and 32000.
        heap: Java heap of each node, as Java's -Xmx takes it ("1g").
        config: more broker settings, e.g. `{"log.retention.ms": 60000}`; they win over the launcher's own.
        auto_create_topics: whether a client's question for an unknown topic creates it (False).
        security: listeners besides the open one: "sasl" (SASL_PLAINTEXT: PLAIN, SCRAM-SHA-256, SCRAM-SHA-512),
            "oauthbearer" (SASL_PLAINTEXT with unsigned tokens), "ssl" (client certificates accepted, not needed),
            "sasl_ssl" (as "sasl", over TLS). `client_config` tells how to connect.
        users: name to password for the SASL listeners (`{"keven": "keven-secret"}`).
        server_certificate: "valid" (default), or what is wrong with it: "expired", "wrong-host".
        proxied: True puts a `FaultProxy` in front of each node; brokers advertise the proxies' addresses, so all
            clients' traffic goes through them. Brokers talk to each other past them. Extra listeners
            (`security`) are not proxied. Default False.
        detached: True leaves the brokers running when this process ends; for the command line.
        on_launch: called when the processes run, before they answer; for the command line.
    """

    def __init__(
        self,
        nodes: int = 1,
        *,
        data_dir: Path | str | None = None,
        ports: Sequence[int | None] | None = None,
        heap: str = "1g",
        config: Mapping[str, object] | None = None,
        auto_create_topics: bool = False,
        security: Iterable[str] = (),
        users: Mapping[str, str] | None = None,
        server_certificate: Literal["valid", "expired", "wrong-host"] = "valid",
        proxied: bool = False,
        detached: bool = False,
        on_launch: Callable[["RealKafka"], None] | None = None,
    ) -> None:
        security = tuple(dict.fromkeys(security))
        unknown = [kind for kind in security if kind not in SECURITY_KINDS]
        if unknown:
            raise ValueError(f"security={unknown}: unknown; use {sorted(SECURITY_KINDS)}")
        if nodes < 1:
            raise ValueError(f"nodes={nodes}: at least 1 is needed")
        if ports is not None and len(ports) != nodes:
            raise ValueError(f"ports={list(ports)}: {nodes} are needed, one per node")
        self.nodes = nodes
        self.proxies: list[FaultProxy] = []
        self._data_dir = Path(data_dir).absolute() if data_dir is not None else None
        self._wanted_ports = ports
        self._heap = heap
        self._config = dict(config or {})
        self._auto_create_topics = auto_create_topics
        self._security = security
        self._users = dict(users or _DEFAULT_USERS)
        self._server_certificate = server_certificate
        self._proxied = proxied
        self._detached = detached
        self._on_launch = on_launch
        self._folder: Path | None = None
        self._command: list[str] = []
        self._settings: dict[int, NodeSettings] = {}
        self._processes: dict[int, BrokerProcess] = {}
        self._reservation = PortReservation()
        self._owner_pid = os.getpid()
        self.certificate_authority: ThrowAwayCa | None = None

    def __repr__(self) -> str:
        state = self.bootstrap_servers if self._settings else "not started"
        return f"RealKafka(nodes={self.nodes}, {state})"

    # ---- addresses

    @property
    def bootstrap_servers(self) -> str:
        """Addresses for clients; those of the proxies when `proxied`."""
        return self._addresses("PLAINTEXT", advertised=True)

    @property
    def direct_bootstrap_servers(self) -> str:
        """Addresses that bypass the proxies (brokers met there advertise direct addresses as well)."""
        return self._addresses("DIRECT" if self._proxied else "PLAINTEXT")

    @property
    def ports(self) -> list[int]:
        """The ports in `bootstrap_servers`, in node order."""
        return [int(address.rpartition(":")[2]) for address in self.bootstrap_servers.split(",")]

    def client_config(
        self, kind: str = "plaintext", *, mechanism: str = "SCRAM-SHA-256", user: str | None = None
    ) -> dict[str, str]:
        """Return the librdkafka settings with which a client connects.

        Args:
            kind: "plaintext" (default), or one of the `security` kinds that this cluster was made with.
            mechanism: "PLAIN", "SCRAM-SHA-256" (default) or "SCRAM-SHA-512"; for "sasl" and "sasl_ssl".
            user: one of `users`; None (default) takes the first.
        """
        if kind != "plaintext" and kind not in self._security:
            raise ValueError(f"kind={kind!r}: this cluster has no such listener; make it with security=[{kind!r}]")
        name = user if user is not None else next(iter(self._users))
        return client_properties(
            kind,
            self.bootstrap_servers if kind == "plaintext" else self._addresses(kind.upper()),
            mechanism=mechanism,
            user=(name, self._users.get(name, "")),
            certificate_authority=self.certificate_authority,
        )

    def _addresses(self, listener_name: str, *, advertised: bool = False) -> str:
        if not self._settings:
            raise RuntimeError("this Kafka is not started: call start(), or use it in a with statement")
        return ",".join(
            f"{HOST}:{listener.advertised_port if advertised else listener.port}"
            for node in self._settings.values()
            for listener in node.listeners
            if listener.name == listener_name
        )

    def _admin_servers(self) -> str:
        # Topics are made whatever the proxies do at that moment.
        return self.direct_bootstrap_servers

    # ---- life of the cluster

    @property
    def folder(self) -> Path:
        """Where data and logs lie: one folder `node-<n>` for each node."""
        if self._folder is None:
            raise RuntimeError("this Kafka is not started: call start(), or use it in a with statement")
        return self._folder

    def start(self, timeout_s: float = 60.0) -> None:
        """Start all nodes and wait until each answers.

        Args:
            timeout_s: seconds the brokers have to answer, once Java runs (60).

        Raises:
            KafkaUnavailable: no Java 17+, no Maven, or Maven failed; the text says what to do.
            KafkaStartError: a broker ended or did not answer; its last log lines are in the text.
        """
        if self._settings:
            raise RuntimeError(f"{self!r} is already started")
        java = find_java()
        if java is None:
            raise KafkaUnavailable(java_unavailable_reason() or "no Java found")
        jars = fetch_jars()
        self._owner_pid = os.getpid()
        self._folder = self._data_dir or Path(tempfile.mkdtemp(prefix="keven-kafka-"))
        if not self._detached:
            atexit.register(self.stop)
        self._command = broker_command(java, jars, self._heap)
        try:
            certificate = self._make_certificate(java)
            for attempt in range(1, _PORT_ATTEMPTS + 1):
                self._configure(certificate)
                format_storage(java, jars, self._settings, self._users if self._has_passwords else {})
                try:
                    self._launch(timeout_s)
                    return
                except KafkaStartError:
                    # The one race left: somebody who does not reserve took a port before the broker did.
                    stolen = any("Address already in use" in log_tail(self.log_path(n), 400) for n in self._settings)
                    if not stolen or self._wanted_ports is not None or attempt == _PORT_ATTEMPTS:
                        raise
                    self._end_processes(at_once=True)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all nodes, and remove the data unless `data_dir` was given. Idempotent.

        Does nothing in a forked child of the process that started the cluster.
        """
        if os.getpid() != self._owner_pid or self._folder is None:
            return
        atexit.unregister(self.stop)
        # Data that nobody will read need not be written in order: SIGKILL saves some seconds.
        self._end_processes(at_once=self._data_dir is None)
        if self._data_dir is None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def _end_processes(self, *, at_once: bool) -> None:
        if not at_once:
            # All together: the last nodes of a quorum could not end in order one after the other.
            for process in self._processes.values():
                process.send(signal.SIGCONT)
                process.send(signal.SIGTERM)
            deadline = time.monotonic() + _TERMINATE_TIMEOUT_S
            for process in self._processes.values():
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in self._processes.values():
            process.close()
        self._processes.clear()
        for proxy in self.proxies:
            proxy.close()
        self.proxies.clear()
        self._reservation.release()
        self._settings.clear()

    @property
    def _has_passwords(self) -> bool:
        return any(kind.startswith("sasl") for kind in self._security)

    # ---- one node

    @property
    def pids(self) -> dict[int, int]:
        """Node to process id, of the nodes that live (paused ones too)."""
        return {node: process.pid for node, process in self._processes.items() if process.is_alive}

    def log_path(self, node: int = 1) -> Path:
        """Return the path of a node's log; it goes on over restarts."""
        self._check(node)
        return self.folder / f"node-{node}" / "broker.log"

    def kill(self, node: int = 1) -> None:
        """End a node as a power failure would (SIGKILL), and wait until it is gone."""
        process = self._process(node)
        process.send(signal.SIGKILL)
        if not process.wait(20):
            raise KafkaStartError(f"node {node} (process {process.pid}) is still there 20 s after SIGKILL")

    def terminate(self, node: int = 1, timeout_s: float = _TERMINATE_TIMEOUT_S) -> None:
        """End a node in order (SIGTERM: it hands its partitions over), and wait until it is gone.

        Args:
            node: which one (1).
            timeout_s: seconds it has (30).

        Raises:
            KafkaStartError: it still lives after that time, e.g. because the quorum is lost: then use `kill`.
        """
        process = self._process(node)
        process.send(signal.SIGCONT)
        process.send(signal.SIGTERM)
        if not process.wait(timeout_s):
            raise KafkaStartError(f"node {node} did not end within {timeout_s:.0f} s of SIGTERM: {self._tail(node)}")

    def restart(self, node: int = 1, *, wait: bool = True, timeout_s: float = 60.0) -> None:
        """Start a node again with its data and its ports; one that lives is terminated first.

        Args:
            node: which one (1).
            wait: True (default) waits until it answers. With fewer than half of the nodes alive it will not.
            timeout_s: seconds it has for that (60).

        Raises:
            KafkaStartError: it ended or did not answer; its last log lines are in the text.
        """
        if self._process(node).is_alive:
            self.terminate(node)
        self._processes[node].close()
        self._spawn(node)
        if wait:
            self._wait_for([node], brokers=1, deadline=time.monotonic() + timeout_s)

    def pause(self, node: int = 1) -> None:
        """Stop a node where it stands (SIGSTOP), and wait until it does: its connections stay open, nothing answers."""
        process = self._process(node)
        process.send(signal.SIGSTOP)
        if not wait_until_stopped(process.pid, 20):
            raise KafkaStartError(f"node {node} (process {process.pid}) did not stop within 20 s, or has ended")

    def resume(self, node: int = 1) -> None:
        """Let a paused node go on (SIGCONT)."""
        self._process(node).send(signal.SIGCONT)

    def _check(self, node: int) -> None:
        if not 1 <= node <= self.nodes:
            raise ValueError(f"node={node}: this cluster has the nodes 1 to {self.nodes}")

    def _process(self, node: int) -> BrokerProcess:
        self._check(node)
        if node not in self._processes:
            raise RuntimeError("this Kafka is not started: call start(), or use it in a with statement")
        return self._processes[node]

    def _tail(self, node: int) -> str:
        return f"the end of {self.log_path(node)}:\n{log_tail(self.log_path(node))}"

    # ---- how a start goes: settings, format, processes, first answer

    def _make_certificate(self, java: str) -> ServerCertificate | None:
        if not any(SECURITY_KINDS[kind].endswith("SSL") for kind in self._security):
            return None
        self.certificate_authority = ThrowAwayCa(self.folder / "tls", find_keytool(java))
        if self._server_certificate == "wrong-host":
            return self.certificate_authority.server(["elsewhere.invalid"])
        return self.certificate_authority.server(expired=self._server_certificate == "expired")

    def _configure(self, certificate: ServerCertificate | None) -> None:
        """Choose the ports and write each node's `server.properties`."""
        take = self._reservation.take
        controllers = {node: take() for node in range(1, self.nodes + 1)}
        for node, controller_port in controllers.items():
            port = take(self._wanted_ports[node - 1] if self._wanted_ports else None)
            advertised = port
            if self._proxied:
                self.proxies.append(FaultProxy(HOST, port))
                advertised = self.proxies[-1].port
            listeners = [Listener("PLAINTEXT", "PLAINTEXT", port, advertised)]
            if self._proxied:
                direct = take()
                listeners.append(Listener("DIRECT", "PLAINTEXT", direct, direct))
            for kind in self._security:
                secure = take()
                listeners.append(Listener(kind.upper(), SECURITY_KINDS[kind], secure, secure))
            folder = self.folder / f"node-{node}"
            folder.mkdir(parents=True, exist_ok=True)
            settings = NodeSettings(
                node, folder, controller_port, listeners, "DIRECT" if self._proxied else "PLAINTEXT"
            )
            text = server_properties(
                settings,
                controllers,
                auto_create_topics=self._auto_create_topics,
                users=self._users,
                certificate=certificate,
                extra=self._config,
            )
            settings.properties.write_text(text, encoding="utf-8")
            self._settings[node] = settings

    def _launch(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for node in self._settings:
            self._spawn(node)
        if self._on_launch is not None:
            self._on_launch(self)
        self._wait_for(list(self._settings), brokers=self.nodes, deadline=deadline)

    def _spawn(self, node: int) -> None:
        self._processes[node] = BrokerProcess(
            [*self._command, str(self._settings[node].properties)],
            self.log_path(node),
            detached=self._detached,
            wipe=self._folder if self._data_dir is None else None,
        )

    def _wait_for(self, nodes: Iterable[int], *, brokers: int, deadline: float) -> None:
        servers = self.direct_bootstrap_servers.split(",")
        for node in nodes:

            def dead(node: int = node) -> str | None:
                process = self._processes[node]
                return None if process.is_alive else f"node {node} ended with code {process.returncode}"

            try:
                wait_until_answering(servers[node - 1], brokers, deadline, dead)
            except KafkaStartError as error:
                raise KafkaStartError(f"{error}; {self._tail(node)}") from None
