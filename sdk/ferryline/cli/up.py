"""`ferryline up`: a cluster on this machine, one process per service, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from ferryline.cli.etcd import REMEDY, etcd_program
from ferryline.cli.failures import FAILED, USAGE, Failed
from ferryline.cli.invocation import of
from ferryline.cli.output import stderr, stdout, warn
from ferryline.cli.processes import COORDINATOR, LocalCluster, Service, free_port, missing_services, port_is_free
from ferryline.cli.settings import DEFAULT_PORT, OUTPUTS, UsageError, local_data_dir
from ferryline.cli.up_auth import CONTEXT, LocalAuth, SavedContext, admit_gateway, known_token, save_context

BROKER_PORT = 9443
FALCONQ, FALCONQ_PORT = "falconq", 8080
RESTART_DELAY_S = 1.0
_INSTALL = "pip install 'ferryline[server]'"


def app(
    ctx: typer.Context,
    brokers: Annotated[int, typer.Option(help="How many brokers.", min=1, max=50)] = 3,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where everything is kept. [default: ~/.ferryline/local]", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the coordinator; 0 picks free ports.")] = DEFAULT_PORT,
    base_broker_port: Annotated[int, typer.Option(help="Port of the first broker; 0 picks free ports.")] = BROKER_PORT,
    restart: Annotated[bool, typer.Option(help="Start a service again when it ends by itself.")] = True,
    coordinators: Annotated[
        int, typer.Option(help="How many coordinators; more than one needs --store etcd.", min=1, max=9)
    ] = 1,
    store: Annotated[str, typer.Option(help="Where coordinators keep records: sqlite or etcd.")] = "sqlite",
    falconq: Annotated[bool, typer.Option("--falconq", help="Serve FalconQ's HTTP, too, on localhost.")] = False,
    falconq_port: Annotated[int, typer.Option(help="Where; 0 picks a free port.", min=0, max=65_535)] = FALCONQ_PORT,
    auth: Annotated[bool, typer.Option("--auth", help="Nothing without a token; makes one, and keeps it.")] = False,
) -> None:
    """Start a coordinator and brokers on this machine, over TLS, and keep them running until Ctrl-C.

    The first start makes a private CA and certificates. Data stays: the next `ferryline up` goes on where this one
    ended. Other commands find the cluster without being told when it runs on the default port and folder.

    Examples:

      ferryline up                                        three brokers on 8443, 9443, 9444, 9445

      ferryline up --brokers 5 --port 0                   five brokers on whatever ports are free

      ferryline up --data-dir /tmp/try --port 0           a second cluster beside the first

      ferryline up --coordinators 3 --store etcd --data-dir ~/ha   three etcd, three coordinators, three brokers

      ferryline up --falconq                              FalconQ's HTTP on localhost:8080, too

      ferryline up --auth                                 nobody without a token; commands here have one, in a context
    """
    _check_store(store, coordinators)
    falconq_port = 0 if port == 0 and falconq_port == FALCONQ_PORT else falconq_port
    _check_machine(port, 0 if port == 0 else base_broker_port, brokers, coordinators, falconq_port if falconq else 0)
    root = (data_dir or local_data_dir()).expanduser().absolute()
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    access = LocalAuth(root)
    if not auth:
        access.warn_if_left_out()
    cluster = LocalCluster(
        root,
        brokers=brokers,
        port=port,
        broker_port=0 if port == 0 else base_broker_port,
        death_signal=signal.SIGTERM,
        coordinators=coordinators,
        store=store,
        coordinator_args=access.prepare() if auth else (),
    )
    if falconq:
        add_falconq(cluster, falconq_port, access.gateway_config if auth else None)
    _run(ctx, cluster, access if auth else None, restart)
    warn("stopped; the data stays in " + str(root))


def _run(ctx: typer.Context, cluster: LocalCluster, access: LocalAuth | None, restart: bool) -> None:
    """From the start of everything to its end, at Ctrl-C."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    coordinators, falconq = len(cluster.coordinators), FALCONQ in cluster.services
    several = f"{coordinators} coordinators" if coordinators > 1 else "a coordinator"
    with stderr().status(f"starting {several} and {len(cluster.brokers)} brokers"):
        cluster.start()
    try:
        saved = _admit(ctx, cluster, access, falconq) if access is not None else None
        if falconq:
            cluster.start_one(FALCONQ)
        _welcome(cluster, _form(ctx), saved)
        _watch(cluster, stop, restart)
    finally:
        with stderr().status("stopping"):
            if falconq:
                stop_falconq(cluster)
            cluster.stop()


def _check_store(store: str, coordinators: int) -> None:
    """Refuse what cannot be: several coordinators on SQLite, etcd where there is none."""
    if store not in ("sqlite", "etcd"):
        raise Failed(f"--store {store}: sqlite or etcd", USAGE, code="INVALID_ARGUMENT")
    if coordinators > 1 and store != "etcd":
        raise Failed(
            f"--coordinators {coordinators}: SQLite is for one",
            USAGE,
            code="INVALID_ARGUMENT",
            remedy="Several coordinators share their records on etcd: --store etcd.",
        )
    if store == "etcd" and etcd_program() is None:
        raise Failed("etcd: not installed", FAILED, code="NOT_INSTALLED", remedy=REMEDY)


def _form(ctx: typer.Context) -> str:
    """--output, without looking at contexts: the one in use may be another cluster's, or gone."""
    form = str(of(ctx).flags.get("output") or os.environ.get("FERRYLINE_OUTPUT") or "table")
    if form not in OUTPUTS:
        raise UsageError(f"output: {form!r} is not one of {', '.join(OUTPUTS)}")
    return form


def _admit(ctx: typer.Context, cluster: LocalCluster, access: LocalAuth, falconq: bool) -> SavedContext:
    """Keep the key of `admin` where commands find it; give the gateway one of its own."""
    from ferryline.cli.connection import connected, run
    from ferryline.cli.settings import Settings

    invocation, url = of(ctx), _url(cluster)
    name = invocation.context or CONTEXT
    token = access.key(known_token(name, invocation.file, cluster.ca))
    saved = save_context(name, invocation.file, url, cluster.ca, token)
    if falconq:

        async def act() -> None:
            async with connected(Settings(url=tuple(url.split(",")), ca=cluster.ca, token=token)) as client:
                await admit_gateway(client.admin, access, url, cluster.ca)

        run(act())
    return saved


def add_falconq(cluster: LocalCluster, port: int, config: Path | None = None) -> None:
    """One more service of ``cluster``: the gateway of `ferryline falconq`. `start_one` starts it.

    ``config``: where its token stands.
    """
    folder, port = cluster.root / FALCONQ, port or free_port(set())
    args = ["falconq", "--port", str(port), "--data-dir", str(folder / "data")]
    args += ["--url", _url(cluster), "--ca", str(cluster.ca)]
    args += ["--config", str(config)] if config is not None else []
    cluster.services[FALCONQ] = Service(FALCONQ, "ferryline.cli", folder, port, args)


def stop_falconq(cluster: LocalCluster) -> None:
    """Before the brokers: what it was asked for it can still do."""
    cluster.terminate(FALCONQ)
    if cluster.wait_ended(FALCONQ) is None:
        cluster.kill(FALCONQ)


def _check_machine(port: int, broker_port: int, brokers: int, coordinators: int, falconq_port: int) -> None:
    """Refuse before anything starts: missing programs, ports in use."""
    if missing := missing_services():
        raise Failed(
            f"{' and '.join(missing)}: not installed", FAILED, code="NOT_INSTALLED", remedy=f"Install: {_INSTALL}"
        )
    wanted = [port + number for number in range(coordinators) if port] + [
        broker_port + number for number in range(brokers) if broker_port
    ]
    wanted += [falconq_port] if falconq_port else []
    if busy := [str(number) for number in wanted if not port_is_free(number)]:
        raise Failed(
            f"port {', '.join(busy)}: in use",
            FAILED,
            code="PORT_IN_USE",
            remedy="Is a cluster running already (ferryline doctor)? Otherwise: --port 0, or --port, "
            "--base-broker-port and --falconq-port with other numbers.",
        )


def _welcome(cluster: LocalCluster, form: str, saved: SavedContext | None) -> None:
    services = [
        {"service": name, "url": service.url, "pid": service.pid, "log": str(service.log_path)}
        for name, service in cluster.services.items()
    ]
    if form != "table":
        from ferryline.cli.output import Output

        told: dict[str, Any] = {"url": _url(cluster), "ca": str(cluster.ca), "services": services}
        if saved is not None:
            access = LocalAuth(cluster.root)
            told |= {"access_file": str(access.access_file), "key_file": str(access.key_file), "context": saved.name}
        Output(form).one(told)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("service", "url", "pid"):
        table.add_column(name, overflow="fold")
    for row in services:
        table.add_row(*(str(row[name]) for name in ("service", "url", "pid")))
    console = stdout()
    console.print(table)
    console.print()
    console.print("[bold]In another terminal:[/bold]")
    if saved is not None and not saved.current:
        console.print(f"  export FERRYLINE_CONTEXT={saved.name}", soft_wrap=True)
    elif saved is None and not _is_default(cluster):
        console.print(f"  export FERRYLINE_URL={_url(cluster)} FERRYLINE_CA={cluster.ca}", soft_wrap=True)
    console.print("  ferryline topic create orders --partitions 12")
    console.print("  echo 'c1 hello' | ferryline produce orders -f '%k %v\\n'")
    console.print("  ferryline consume orders --from start")
    if saved is not None:
        console.print("  ferryline principal create shop --write topic:orders --key  # a token")
        console.print(
            f"\nAccess is on: nothing without a token. The key of admin is in context {saved.name} of {saved.file};\n"
            f"who may do what: ferryline principal, and {LocalAuth(cluster.root).access_file}",
            soft_wrap=True,
        )
    console.print(f"\nCtrl-C stops it. Data, CA and logs stay in {cluster.root}", soft_wrap=True)


def _is_default(cluster: LocalCluster) -> bool:
    """Whether commands find it without being told."""
    return _url(cluster) == f"https://127.0.0.1:{DEFAULT_PORT}" and cluster.root == local_data_dir().absolute()


def _url(cluster: LocalCluster) -> str:
    """What FERRYLINE_URL has to be: all coordinators."""
    return ",".join(cluster.services[name].url for name in cluster.coordinators)


def _watch(cluster: LocalCluster, stop: threading.Event, restart: bool) -> None:
    """Wait for Ctrl-C; bring back what ended by itself. Raises Failed when the coordinator or, without restarts,
    any service is gone."""
    starting: dict[str, Service] = {}
    while not stop.wait(RESTART_DELAY_S):
        for service in list(cluster.ended()):
            code = service.process.returncode if service.process is not None else None
            if not restart:
                raise Failed(f"{service.name} ended with status {code}\n{service.log_tail()}")
            warn(f"{service.name} ended with status {code}; starting it again (log: {service.log_path})")
            cluster.spawn(service.name)
            starting[service.name] = service
        for name in list(starting):
            try:
                if cluster.is_ready(name):
                    warn(f"{name} is back, pid {starting.pop(name).pid}")
            except Exception as error:
                del starting[name]
                if name == COORDINATOR and len(cluster.coordinators) == 1:
                    raise Failed(str(error)) from None
                warn(str(error))
