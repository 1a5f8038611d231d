/**
 * The page's service worker: it works without a network, and has threads also where the server sends no headers.
 *
 * The files of the model are not its matter: `bksdm/files.js` keeps them, and asks for them without a cache.
 */

const worker = /** @type {any} */ (self); // TypeScript has the types of pages and of service workers in different worlds
const KEPT = "bksdm-page";
const FILES = ["./", "index.html", "page.css", "page.js", "bksdm.js", "manifest.json", "vendor/tokenizers/tokenizers.min.mjs"];
const MODULES = ["files", "networks", "noise", "pipeline", "png", "samplers", "schedule", "tokens", "worker"];
const HEADERS = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

worker.addEventListener("install", (/** @type {any} */ event) => {
  worker.skipWaiting();
  event.waitUntil(keepAll());
});

worker.addEventListener("activate", (/** @type {any} */ event) => event.waitUntil(worker.clients.claim()));

worker.addEventListener("fetch", (/** @type {any} */ event) => {
  /** @type {Request} */
  const request = event.request;
  const ours = request.method === "GET" && request.url.startsWith(worker.registration.scope);
  if (ours && request.cache !== "no-store") event.respondWith(answered(request));
});

/** Keep what the page is made of, which it asked for before it had this worker. */
async function keepAll() {
  const cache = await caches.open(KEPT);
  await cache.addAll([...FILES, ...MODULES.map((name) => `bksdm/${name}.js`)]);
}

/**
 * The server's answer, which is kept; without a network, what was kept.
 *
 * @param {Request} request
 */
async function answered(request) {
  const cache = await caches.open(KEPT);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(request, response.clone());
    return withHeaders(response);
  } catch {
    const kept = await cache.match(request);
    return kept ? withHeaders(kept) : Response.error();
  }
}

/** @param {Response} response */
function withHeaders(response) {
  if (response.type === "opaque" || response.redirected) return response;
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  const { status, statusText } = response;
  return new Response(response.body, { status, statusText, headers });
}
