/**
 * The files of a model: fetched with progress, held to their digests, and kept in the browser for the next visit.
 *
 * What is kept goes by its digest, so that a file of a newer export is another one.
 */

const KEPT = "bksdm";

/**
 * @typedef {object} Entry A file in the manifest.
 * @property {string} path Below the folder.
 * @property {number} bytes
 * @property {string} sha256 In hexadecimal.
 */

/** @typedef {(done: number, all: number) => void} Progress Told how many bytes there are, and of how many. */

/**
 * The files of these entries, in their order.
 *
 * @param {URL} base The folder.
 * @param {Entry[]} entries
 * @param {Progress} progress
 */
export async function files(base, entries, progress) {
  const all = entries.reduce((sum, entry) => sum + entry.bytes, 0);
  let done = 0;
  const found = [];
  for (const entry of entries) {
    found.push(await file(base, entry, (more) => progress((done += more), all)));
  }
  return found;
}

/**
 * @param {URL} base
 * @param {Entry} entry
 * @param {(bytes: number) => void} more Told of every piece.
 */
async function file(base, entry, more) {
  const cache = await opened();
  const key = new URL(`${entry.path}?sha256=${entry.sha256}`, base);
  const kept = await cache?.match(key);
  if (kept) {
    const content = new Uint8Array(await kept.arrayBuffer());
    if ((await digest(content)) === entry.sha256) {
      more(entry.bytes);
      return content;
    }
    await cache?.delete(key);
  }
  const content = await fetched(new URL(entry.path, base), entry, more);
  if ((await digest(content)) !== entry.sha256) throw damaged(entry.path, "its digest is not the manifest's");
  // Where there is no room, the next visit fetches the file again.
  await cache?.put(key, new Response(content)).catch(() => {});
  return content;
}

/**
 * @param {URL} url
 * @param {Entry} entry
 * @param {(bytes: number) => void} more
 */
async function fetched(url, entry, more) {
  const response = await answer(url, entry.path, "no-store");
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const content = new Uint8Array(entry.bytes);
  let place = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (place + value.length > content.length) throw damaged(entry.path, `it has more than ${entry.bytes} bytes`);
    content.set(value, place);
    place += value.length;
    more(value.length);
  }
  if (place < content.length) throw damaged(entry.path, `it has ${place} of ${entry.bytes} bytes`);
  return content;
}

/**
 * The response of a server that has a file.
 *
 * @param {URL} url
 * @param {string} path As it is called in messages.
 * @param {RequestCache} [cache] Whether the browser keeps it besides.
 */
export async function answer(url, path, cache = "default") {
  let response;
  try {
    response = await fetch(url, { cache });
  } catch {
    throw new Error(`${path} cannot be fetched, and is not kept from an earlier visit; connect to the network and try again`);
  }
  if (!response.ok) throw new Error(`${path} is missing on the server (${response.status}); upload the whole folder again`);
  return response;
}

/**
 * @param {string} path
 * @param {string} why
 */
function damaged(path, why) {
  return new Error(`${path} is damaged: ${why}; upload the folder again`);
}

/** @param {Uint8Array<ArrayBuffer>} content */
async function digest(content) {
  const bytes = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Where files are kept; null where the browser keeps none, as in some private windows. */
async function opened() {
  try {
    return await caches.open(KEPT);
  } catch {
    return null;
  }
}
