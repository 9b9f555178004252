"""The Java commands: how a node's storage is formatted, and how the node is started."""

import base64
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path

from keven_core.testing._broker_process.errors import KafkaStartError
from keven_core.testing._broker_process.settings import NodeSettings

__all__ = ["broker_command", "format_storage"]

_LOG_SETTINGS = Path(__file__).with_name("log4j2.xml")
_FORMAT_TIMEOUT_S = 60.0


def broker_command(java: str, jars: Path, heap: str) -> list[str]:
    """Return the command that starts a node, less its last argument, the settings file.

    Args:
        java: the program.
        jars: folder with Kafka's jars.
        heap: as -Xmx takes it; all of it is reserved from the start, so that a benchmark never waits for it to grow.
    """
    options = [f"-Xms{heap}", f"-Xmx{heap}", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20", "-Djava.awt.headless=true"]
    return [java, *options, *_classpath(jars), "kafka.Kafka"]


def format_storage(java: str, jars: Path, nodes: Mapping[int, NodeSettings], scram_users: Mapping[str, str]) -> None:
    """Write the cluster's id and first records into each data folder that has none. Blocks some 1.5 s.

    Args:
        java: the program.
        jars: folder with Kafka's jars.
        nodes: settings of each node; their files are written already.
        scram_users: name to password, of the users that log in with SCRAM. They are records of the cluster, not
            settings, so a folder that is formatted already keeps those it has.

    Raises:
        KafkaStartError: the tool refused (a wrong setting, say), or took longer than 60 s.
    """
    metas = {node: settings.data_folder / "meta.properties" for node, settings in nodes.items()}
    # All nodes of a cluster carry the same id: that of a node which has one.
    known = [line for meta in metas.values() if meta.exists() for line in meta.read_text().splitlines()]
    ids = [line.partition("=")[2] for line in known if line.startswith("cluster.id=")]
    # As Kafka's own Uuid class writes it: base64url without padding.
    cluster_id = ids[0] if ids else base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    # One small, short-lived JVM per node, all at once.
    command = [java, "-Xmx128m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", *_classpath(jars)]
    # Joined by "=": one id in 64 begins with "-", and would be taken for another option.
    command += ["kafka.tools.StorageTool", "format", f"--cluster-id={cluster_id}"]
    for name, password in scram_users.items():
        for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):
            command += ["--add-scram", f"{mechanism}=[name={name},password={password}]"]
    running = {
        node: subprocess.Popen(
            [*command, "--config", str(nodes[node].properties)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, meta in metas.items()
        if not meta.exists()
    }
    try:
        for node, process in running.items():
            output, _ = process.communicate(timeout=_FORMAT_TIMEOUT_S)
            if process.returncode != 0:
                raise KafkaStartError(f"could not format the data folder of node {node}: {output.strip()}")
    except subprocess.TimeoutExpired as error:
        raise KafkaStartError(f"formatting took longer than {_FORMAT_TIMEOUT_S:.0f} s: {error}") from error
    finally:
        for process in running.values():
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _classpath(jars: Path) -> list[str]:
    return [f"-Dlog4j2.configurationFile={_LOG_SETTINGS}", "-cp", f"{jars}/*"]
