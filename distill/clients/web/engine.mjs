// The worker, as functions that answer later.

// A worker that is begun from a blob keeps to the page's Content-Security-Policy: what it asks for stays on this server.
function beginWorker() {
  const source = `import ${JSON.stringify(new URL("worker.mjs", import.meta.url).href)};`;
  const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  return new Worker(address, { type: "module" });
}

export class Engine {
  // `hear` is told of events: loading, picture, progress.
  constructor(hear) {
    this.waiting = new Map();
    this.number = 0;
    this.worker = beginWorker();
    this.worker.onmessage = ({ data: { id, event, result, error, ...more } }) => {
      if (event) return hear(event, more);
      const waiting = this.waiting.get(id);
      this.waiting.delete(id);
      if (error === undefined) waiting?.resolve(result);
      else waiting?.reject(new Error(error));
    };
    this.worker.onerror = (event) => {
      for (const { reject } of this.waiting.values()) reject(new Error(event.message || "The worker did not start."));
      this.waiting.clear();
    };
  }

  ask(kind, more = {}) {
    const id = ++this.number;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, kind, ...more });
    });
  }

  cancel() {
    this.worker.postMessage({ kind: "cancel" });
  }
}
