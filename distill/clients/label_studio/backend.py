"""What Label Studio asks of a machine-learning backend, and what it is answered."""

import threading
import uuid
from typing import Any

from brush import encode_mask
from errors import Refused
from fetching import Pictures
from labelling import picture_of, read_config, read_prompt
from segmenter import Segmenter


class Backend:
    """What the endpoints answer; may be used from several threads.

    Args:
        segmenter: encoder and decoder.
        pictures: where those of tasks come from.
        workers: predictions at a time; others wait.
    """

    def __init__(self, segmenter: Segmenter, pictures: Pictures, workers: int = 2) -> None:
        self.segmenter = segmenter
        self.pictures = pictures
        self.version = segmenter.fingerprint
        self._turn = threading.BoundedSemaphore(workers)

    def health(self, request: dict[str, Any]) -> dict[str, Any]:
        """That it is there, and which model it has."""
        return {"status": "UP", "model_version": self.version, "providers": self.segmenter.providers}

    def setup(self, request: dict[str, Any]) -> dict[str, Any]:
        """What Label Studio asks when a project is connected, and whenever it wants to know the model's version."""
        return {"model_version": self.version}

    def versions(self, request: dict[str, Any]) -> dict[str, Any]:
        """The one that there is."""
        return {"versions": [self.version]}

    def learn(self, request: dict[str, Any]) -> dict[str, Any]:
        """What Label Studio tells of annotations: the model does not learn here, so that is heard and left at that."""
        return {"status": "ignored", "detail": "the model does not learn from annotations"}

    def predict(self, request: dict[str, Any]) -> dict[str, Any]:
        """Predictions, one a task: a brush region for what was clicked in the first; an empty list for a task in which
        nothing was, for a prediction of nothing would be stored with it.

        Raises:
            Refused: the request makes no sense, or the picture cannot be had.
            BadPicture: it cannot be read.
        """
        tasks = request.get("tasks")
        if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
            raise Refused("tasks is no list of tasks")
        params = request.get("params")
        context = params.get("context") if isinstance(params, dict) else None
        regions = context.get("result") if isinstance(context, dict) else None
        results: list[Any] = [[] for _ in tasks]
        if regions and tasks:
            results[0] = self.interactive(tasks[0], regions, request.get("label_config"))
        return {"results": results, "model_version": self.version}

    def interactive(self, task: dict[str, Any], regions: Any, config: Any) -> dict[str, Any]:
        """The object that an annotator pointed at, as a prediction of one brush region; of none if nothing is found."""
        prompt = read_prompt(regions, read_config(config))
        encoded = self.pictures.fetch(picture_of(prompt.image, task.get("data"), prompt.item_index), task.get("id"))
        with self._turn:
            embedding, (width, height) = self.segmenter.look(encoded)
            if prompt.size not in (None, (width, height)):
                raise Refused(f"the picture is {width}×{height} px, and Label Studio says {prompt.size}", 422)
            points, box = prompt.in_pixels(width, height)
            found = self.segmenter.segment(embedding, (width, height), points, prompt.labels, box)
            if not found.mask.any():
                return self.prediction()
            value = {"format": "rle", "rle": encode_mask(found.mask), "brushlabels": [prompt.label]}
        region = {
            "id": uuid.uuid4().hex[:10],
            "type": "brushlabels",
            "from_name": prompt.brush.name,
            "to_name": prompt.image.name,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": value,
            "score": found.predicted_iou,
            "readonly": False,
        }
        if prompt.item_index is not None:
            region["item_index"] = prompt.item_index
        return self.prediction(region)

    def prediction(self, *regions: dict[str, Any]) -> dict[str, Any]:
        """As Label Studio reads it; its score is that of its region, the model's estimate of the mask's IoU."""
        score = max((region["score"] for region in regions), default=0.0)
        return {"result": list(regions), "score": score, "model_version": self.version}

    def refusal(self, reason: str) -> dict[str, Any]:
        """What is answered where nothing can be: the reason, and a prediction of nothing."""
        return {"error": reason, "results": [self.prediction()], "model_version": self.version}
