/** PNG files with texts inside, as `bksdm/runtime/png.py` writes them, and how a picture was made as such texts. */

const SIGNATURE = Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a);
const NEGATIVE = "Negative prompt:";

/**
 * @typedef {object} About How a picture was made.
 * @property {string} prompt
 * @property {string} negative
 * @property {number} seed
 * @property {number} steps
 * @property {number} guidance
 * @property {string} model
 * @property {string} scheduler Its class's name.
 * @property {string} sampler What AUTOMATIC1111's web interface calls it.
 * @property {number | null} strength With which a picture was begun from.
 */

/**
 * The file of a picture.
 *
 * @param {import("./pipeline.js").Pixels} picture
 * @param {Record<string, string>} texts By keyword.
 */
export async function encode({ data, width, height }, texts) {
  const rows = new Uint8Array(height * (3 * width + 1)); // each begins with 0, of no filter
  for (let i = 0, to = 0; i < width * height; i++) {
    if (i % width === 0) to++;
    for (let channel = 0; channel < 3; channel++) rows[to++] = data[4 * i + channel];
  }
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint16(8, 0x0802); // 8 bits, RGB
  const chunks = [
    chunk("IHDR", new Uint8Array(header.buffer)),
    ...Object.entries(texts).map(([keyword, text]) => textChunk(keyword, text)),
    chunk("IDAT", await deflated(rows)),
    chunk("IEND", new Uint8Array(0)),
  ];
  return new Blob([SIGNATURE, ...chunks], { type: "image/png" });
}

/**
 * What goes into the PNG, by keyword: as AUTOMATIC1111's web interface writes it, and all of it as JSON.
 *
 * @param {About} about
 * @param {number} width
 * @param {number} height
 */
export function texts({ prompt, negative, seed, steps, guidance, model, scheduler, sampler, strength }, width, height) {
  const away = guidance > 1 ? negative : "";
  const fields = {
    Steps: steps,
    Sampler: sampler,
    "CFG scale": guidance,
    Seed: seed,
    Size: `${width}x${height}`,
    Model: model,
    ...(strength === null ? {} : { "Denoising strength": strength }),
  };
  const settings = Object.entries(fields).map(([name, value]) => `${name}: ${quoted(String(value))}`).join(", ");
  const written = prompt.replaceAll(NEGATIVE, NEGATIVE.toLowerCase()); // readers would end the prompt there
  const lines = [written, ...(away ? [`${NEGATIVE} ${away}`] : []), settings];
  const told = { prompt, seed, ...(away ? { negative_prompt: away } : {}), model, steps, guidance };
  const rest = { ...(strength === null ? {} : { strength }), scheduler, width, height };
  return { parameters: lines.join("\n").trim(), bksdm: JSON.stringify({ ...told, ...rest }) };
}

/**
 * What would be taken for more than one setting, in quotes.
 *
 * @param {string} text
 */
function quoted(text) {
  return /[,:\n]/.test(text) ? JSON.stringify(text) : text;
}

/**
 * In Latin-1 where that has the letters, which more programs read; else in UTF-8, uncompressed, of no language.
 *
 * @param {string} keyword
 * @param {string} text
 */
function textChunk(keyword, text) {
  const latin = [...text].every((letter) => letter <= "\xff");
  const content = `${keyword}${latin ? "\0" : "\0\0\0\0\0"}${text}`;
  const bytes = latin ? Uint8Array.from(content, (letter) => letter.charCodeAt(0)) : new TextEncoder().encode(content);
  return chunk(latin ? "tEXt" : "iTXt", bytes);
}

/**
 * @param {string} kind
 * @param {Uint8Array} content
 */
function chunk(kind, content) {
  const bytes = new Uint8Array(content.length + 12);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set(new TextEncoder().encode(kind), 4);
  bytes.set(content, 8);
  view.setUint32(content.length + 8, crc(bytes.subarray(4, content.length + 8)));
  return bytes;
}

/**
 * The cyclic redundancy check of PNG.
 *
 * @param {Uint8Array} bytes
 */
function crc(bytes) {
  let rest = -1;
  for (const byte of bytes) {
    rest ^= byte;
    for (let bit = 0; bit < 8; bit++) rest = (rest >>> 1) ^ (rest & 1 ? 0xedb88320 : 0);
  }
  return ~rest >>> 0;
}

/** @param {Uint8Array<ArrayBuffer>} bytes */
async function deflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
