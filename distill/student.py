"""The recipe's student: what it is, and which weights it begins with."""

from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from distill.recipe import Recipe
from distill.run import begun_recipe, checkpoints_of, finished_checkpoints
from distill.schema import AUTO
from students import (
    InputError,
    StudentConfig,
    StudentEncoder,
    build_encoder,
    check_pretrained,
    differences,
    load_encoder,
    shapes_of,
    student_config_of,
)


def student_config(recipe: Recipe, channels: int = 256) -> StudentConfig:
    """The recipe's student, with as many channels as the teacher's embedding has."""
    settings = {key: value for key, value in vars(recipe.student).items() if key not in ("pretrained", "start")}
    settings["overrides"] = dict(settings["overrides"])
    return StudentConfig(image_size=recipe.image_size, embed_dim=channels, **settings)


def begin_student(recipe: Recipe, channels: int) -> StudentEncoder:
    """The recipe's student before its first step: drawn, with an ImageNet backbone, or as `student.start` has it. Where
    the run has a checkpoint, which has all weights, they are drawn: what it began with may be gone.

    Raises:
        InputError: there is no such student, or its weights cannot be had or do not fit.
    """
    config = student_config(recipe, channels)
    if finished_checkpoints(checkpoints_of(recipe)):
        return build_encoder(config)
    student = build_encoder(config, recipe.student.pretrained)
    if recipe.student.start is not None:
        begun = load_encoder(recipe.student.start)
        refuse_other_student(recipe, begun.config)
        expected, found = (shapes_of(encoder.state_dict()) for encoder in (student, begun))
        if differing := differences(expected, found):
            raise InputError(f"student.start={recipe.student.start} does not fit the recipe's student: {differing}")
        student.load_state_dict(begun.state_dict())
    return student


def check_student(recipe: Recipe, channels: int | None) -> None:
    """Raise `InputError` where `begin_student` would, except for what only a download can tell.

    Args:
        channels: of the teacher's embedding; None where they are not known yet.
    """
    pretrained, start = recipe.student.pretrained, recipe.student.start
    if finished_checkpoints(checkpoints_of(recipe)):
        pretrained, start = False, None
    if pretrained is True:
        check_pretrained(recipe.student.name)
    from_file = isinstance(pretrained, str) and pretrained != AUTO
    if start is not None:
        width = student_config_of(start).embed_dim
        if channels not in (None, width):
            raise InputError(
                f"student.start={start} makes embeddings of {width} channels, and the teacher's have {channels}"
            )
        begin_student(recipe, width)
        return
    with torch.device("cpu" if from_file else "meta"):
        build_encoder(student_config(recipe), pretrained if from_file else False)


def refuse_other_student(recipe: Recipe, begun: StudentConfig) -> None:
    """Raise `InputError` unless `student.start` is the recipe's student, if at another image size."""
    config = student_config(recipe, begun.embed_dim)
    same = replace(config, image_size=begun.image_size, input_size=begun.input_size)
    if same != begun:
        pairs = ((key, value, asdict(begun)[key]) for key, value in asdict(same).items())
        differing = "; ".join(f"student.{key}={value}, there {other}" for key, value, other in pairs if value != other)
        raise InputError(f"student.start={recipe.student.start} is another student: {differing}")


def settle_pretrained(recipe: Recipe, accelerator: Accelerator, trains: bool) -> None:
    """Put what `student.pretrained=auto` comes to into the recipe: what its run began with, or else, if this command
    trains, true or false by whether the main process gets the weights."""
    if recipe.student.pretrained != AUTO:
        return
    settled: Any = AUTO
    if accelerator.is_main_process:
        if begun := begun_recipe(recipe):
            settled = begun.student.pretrained
        elif trains:
            settled = _can_be_had(recipe, accelerator)
    recipe.student.pretrained = gather_object([settled])[0]


def _can_be_had(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Whether timm's ImageNet weights are here or can be downloaded, which is done."""
    try:
        with torch.random.fork_rng(devices=[]):
            build_encoder(student_config(recipe), pretrained=True)
    except InputError as error:
        accelerator.print(f"student.pretrained=auto: false, the student begins with drawn weights: {error}")
        return False
    accelerator.print(f"student.pretrained=auto: true, the student begins with timm's weights of {recipe.student.name}")
    return True
