// A grey PNG, row by row, so that a mask of a hundred megapixels is never in memory: https://www.w3.org/TR/png-3/.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? 0xedb88320 ^ (crc >>> 1) : crc >>> 1;
  return crc;
});

function chunk(kind, data) {
  const found = new Uint8Array(data.length + 12);
  const view = new DataView(found.buffer);
  view.setUint32(0, data.length);
  for (let i = 0; i < 4; i++) found[4 + i] = kind.charCodeAt(i);
  found.set(data, 8);
  let crc = 0xffffffff;
  for (let i = 4; i < found.length - 4; i++) crc = TABLE[(crc ^ found[i]) & 255] ^ (crc >>> 8);
  view.setUint32(found.length - 4, (crc ^ 0xffffffff) >>> 0);
  return found;
}

// `fill(y, row)` puts row y into an array of a byte a pixel. The parts of a file, for a Blob.
export async function greyPng(width, height, fill) {
  const header = new Uint8Array(13);
  const view = new DataView(header.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  header[8] = 8; // bits of a pixel; then grey, and the only ways of compressing and filtering
  const zlib = new CompressionStream("deflate");
  const parts = [Uint8Array.from(SIGNATURE), chunk("IHDR", header)];
  const compressed = (async () => {
    for (const reader = zlib.readable.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) return;
      parts.push(chunk("IDAT", value));
    }
  })();
  const writer = zlib.writable.getWriter();
  const rows = Math.max(1, Math.floor((1 << 18) / (width + 1)));
  for (let start = 0; start < height; start += rows) {
    const count = Math.min(rows, height - start);
    const block = new Uint8Array(count * (width + 1)); // before each row a 0: it is not filtered
    for (let i = 0; i < count; i++) fill(start + i, block.subarray(i * (width + 1) + 1, (i + 1) * (width + 1)));
    await writer.write(block);
  }
  await writer.close();
  await compressed;
  return [...parts, chunk("IEND", new Uint8Array(0))];
}

// A mask of logits: 255 on the object.
export function maskPng(enlarger, logits) {
  const line = new Float64Array(enlarger.width);
  return greyPng(enlarger.width, enlarger.height, (y, row) => {
    enlarger.row(logits, y, line);
    for (let x = 0; x < row.length; x++) row[x] = line[x] > 0 ? 255 : 0;
  });
}
