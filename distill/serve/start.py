"""From a recipe to a server that is up: files, engine, warm-up, port."""

import asyncio
import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from starlette.types import ASGIApp

from distill.export.subject import Subject, load_subject
from distill.reading import reading_of
from distill.recipe import Recipe
from distill.serve.app import ROUTES, routes_of
from distill.serve.engines import Engine, OnnxEngine, TorchEngine
from distill.serve.exchange import Bodies
from distill.serve.files import make_files
from distill.serve.guard import Guard, host_name
from distill.serve.messages import Health
from distill.serve.metrics import Metrics
from distill.serve.rehearsal import rehearse
from distill.serve.server import Accept, Server, bind, is_loopback, url_of
from distill.serve.service import Service
from distill.serve.token import token_of
from embeddings_cache.images import Reading
from embeddings_cache.system import available_cores, read_json
from students import InputError

BATCH = 4
"""Pictures that are encoded together at most where that pays, which it does not on a CPU."""

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")


def serve(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Serve the chosen student until told to stop; always True.

    Raises:
        InputError: there is nothing to serve, or no place to serve it at.
        ParityError: a file does not do what the student does.
    """
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
    token = token_of(recipe)
    with bind(recipe.host, recipe.port) as listener:  # before minutes are spent on files
        engine, student = load_engine(recipe, accelerator)
        metrics, decoders = Metrics(ROUTES), recipe.serve.decoders or available_cores()
        reading = Reading(recipe.serve.max_pixels, reading_of(recipe).sixteen_bit)
        batch_size = recipe.serve.batch_size or (1 if engine.on_cpu else BATCH)
        service = Service(engine, recipe.serve, reading, recipe.predict, decoders, batch_size, metrics)
        print(f"serve: {student} on {engine.about}, warming up ...", flush=True)
        asyncio.run(service.warm_up())
        health = Health("ok", student, engine.image_size, engine.about)
        hosts = hosts_of(recipe, token)
        app = application(service, health, page_of(recipe), token, hosts)
        line = f"serve: {url_of(listener)} {facts(recipe, engine, student, decoders, token)}"

        async def rehearsal(accept: Accept) -> None:
            shown = {"Authorization": f"Bearer {token}"} if token else {}
            await rehearse(accept, {"Host": host_name((hosts or ["localhost"])[0]), **shown})
            service.embeddings.clear()

        Server(app, recipe.serve.stop_seconds, lambda: print(line, flush=True), rehearsal).serve_on(listener)
    print("serve: stopped", flush=True)
    return True


def load_engine(recipe: Recipe, accelerator: Accelerator) -> tuple[Engine, str]:
    """What encodes and decodes, and the student's name.

    Raises:
        InputError: there is no student, or no decoder for it.
    """
    settings = recipe.serve
    if settings.backend == "torch":
        subject: Subject = load_subject(recipe)
        if subject.sam is None:
            raise InputError(f"serve: {subject.note}")
        return TorchEngine(subject.sam, accelerator.device, settings.batch_size or BATCH), subject.name
    folder = make_files(recipe, accelerator, accelerator.print)
    # Masks are enlarged with PyTorch, in as many threads as requests are worked on at once.
    torch.set_num_threads(1)
    engine = OnnxEngine(folder, settings.threads or available_cores(), settings.batch_size or BATCH)
    return engine, str(read_json(folder / "manifest.json")["student"]["name"])


def application(
    service: Service, health: Health, page: Path | None, token: str | None, hosts: list[str] | None
) -> ASGIApp:
    """All that answers: routes behind the guard."""
    bodies = Bodies(int(service.settings.body_mb * 2**20))
    embeddings = service.embeddings
    service.metrics.watch(lambda: len(embeddings), lambda: embeddings.bytes, lambda: bodies.held)
    return Guard(routes_of(service, bodies, health, page), service.metrics, token, hosts)


def hosts_of(recipe: Recipe, token: str | None) -> list[str] | None:
    """What the header Host may say: where there is a token and no name is given, anything."""
    named = list(recipe.serve.hosts)
    if token is not None and not named:
        return None
    own = [recipe.host, f"[{recipe.host}]"] if recipe.host else []
    return [*named, *own, *(LOOPBACK_NAMES if is_loopback(recipe.host) else ())]


def page_of(recipe: Recipe) -> Path | None:
    """The folder that `/` shows, if the run has one."""
    folder = Path(recipe.run_dir) / "export" / "web"
    return folder.resolve() if recipe.serve.page and (folder / "index.html").is_file() else None


def facts(recipe: Recipe, engine: Engine, student: str, decoders: int, token: str | None) -> str:
    """What is served, where, and how much of it, in a line."""
    settings = recipe.serve
    return "; ".join(
        [
            f"{student} at {engine.image_size} px on {engine.about}",
            f"{settings.cache_mb} MB of embeddings, {decoders} requests for masks at once",
            f"at most {settings.body_mb:g} MB and {settings.max_pixels:,} pixels, {settings.prompts} prompts, "
            f"{settings.queue} waiting, {settings.seconds:g} s",
            "with a token" if token else "without a token, for this machine alone",
        ]
    )
