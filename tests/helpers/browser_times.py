"""How long exported encoders and decoders take in headless Chromium: `python tests/helpers/browser_times.py FILE...`

ONNX Runtime's WASM with one thread and with two, and `--webgpu` too (SwiftShader's, on the processor: that it works,
not how fast). Files take turns, in a browser started anew each round.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from statistics import median

from browser import ISOLATED, NO_GPU, SOFTWARE_WEBGPU, BrowserError, browsing, served
from distill.export.runtime import FILES, browser_runtime

SCRIPT = """(async () => {
  const ort = await import(`./${PROVIDER === "webgpu" ? "ort.webgpu" : "ort.wasm"}.bundle.min.mjs`);
  ort.env.wasm.numThreads = THREADS;
  const session = await ort.InferenceSession.create(NAME, { executionProviders: [PROVIDER] });
  const feeds = {};
  for (const input of session.inputMetadata) {
    const dims = input.shape.map((side) => (typeof side === "number" ? side : input.name === "point_labels" ||
      input.name === "point_coords" ? [PROMPTS, 2, 2][input.shape.indexOf(side)] : PROMPTS));
    const values = new Float32Array(dims.reduce((a, b) => a * b, 1));
    for (let i = 0; i < values.length; i++) values[i] = input.name === "image" ? (i * 7919) % 256 : (i % 13) / 13;
    feeds[input.name] = new ort.Tensor("float32", values, dims);
  }
  const took = [];
  for (let run = 0; run <= RUNS; run++) {
    const began = performance.now();
    await session.run(feeds);
    took.push(performance.now() - began);
  }
  await session.release();
  return took;
})()"""


def main() -> None:
    """Print a line for each file and number of threads, in ms: the quickest run, which a busy machine disturbs least,
    and the median of rounds' medians with their range."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=1, help="that a decoder of many is asked for at once")
    parser.add_argument("--webgpu", action="store_true")
    given = parser.parse_args()
    kinds = [("wasm", 1), ("wasm", 2), *([("webgpu", 1)] if given.webgpu else [])]
    rounds: dict[tuple[Path, str, int], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "served")
        folder.mkdir()
        runtime = browser_runtime(print)
        for name in FILES:
            (folder / name).symlink_to(runtime / name)
        (folder / "index.html").write_text("<!doctype html><title>times</title>")
        for number, file in enumerate(given.files):
            (folder / f"{number}.onnx").symlink_to(file.resolve())
        with served(folder, ISOLATED) as server:
            for _ in range(given.rounds):
                for provider, threads in kinds:
                    flags = SOFTWARE_WEBGPU if provider == "webgpu" else NO_GPU
                    with browsing(Path(place, "profile"), flags) as browser:
                        for number, file in enumerate(given.files):
                            browser.open(server.address)
                            words = {"NAME": f"'{number}.onnx'", "THREADS": threads, "RUNS": given.runs,
                                     "PROVIDER": f"'{provider}'", "PROMPTS": given.prompts}  # fmt: skip
                            script = SCRIPT
                            for word, value in words.items():
                                script = script.replace(word, str(value))
                            try:
                                _, *others = browser.evaluate(script, wait=600)
                            except BrowserError as error:
                                print(f"{file} {provider} {threads}: {str(error).splitlines()[0]}")
                                continue
                            rounds.setdefault((file, provider, threads), []).append(others)
                    shutil.rmtree(Path(place, "profile"))
    for (file, provider, threads), found in rounds.items():
        medians = [median(each) for each in found]
        print(
            f"{file} {provider} {threads}: least {min(map(min, found)):.0f} ms, "
            f"median {median(medians):.0f} [{min(medians):.0f}, {max(medians):.0f}]"
        )


if __name__ == "__main__":
    main()
