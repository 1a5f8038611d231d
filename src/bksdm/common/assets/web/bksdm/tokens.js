/** Prompts to tokens as the text encoder takes them, by Hugging Face's tokenizers library for JavaScript. */

/**
 * @typedef {object} Captions How captions become tokens.
 * @property {number} length Tokens that the text encoder takes, with those at start and end.
 * @property {number} pad The token to fill up with.
 * @property {Record<string, string>} words Saved words of several vectors, and what is written for all of them.
 */

/**
 * @typedef {object} Encoder What is used here of the library's `Tokenizer`.
 * @property {(text: string) => {ids: number[]}} encode
 * @property {(text: string) => string[]} tokenize
 * @property {(ids: number[], options: {skip_special_tokens: boolean}) => string} decode
 */

/** What a tokenizer of transformers gives for `(prompt, padding="max_length", truncation=True)`. */
export class Tokenizer {
  /**
   * @param {Encoder} encoder
   * @param {Captions} captions
   */
  constructor(encoder, captions) {
    this.encoder = encoder;
    this.captions = captions;
  }

  /**
   * Tokens of a prompt, and the end of it that the text encoder does not see.
   *
   * @param {string} prompt
   * @returns {{ids: number[], lost: string}}
   */
  encode(prompt) {
    const { length, pad } = this.captions;
    const text = this.written(prompt);
    const { ids } = this.encoder.encode(text);
    if (ids.length <= length) return { ids: [...ids, ...Array(length - ids.length).fill(pad)], lost: "" };
    const end = ids[ids.length - 1];
    return { ids: [...ids.slice(0, length - 1), end], lost: this.ending(text, ids.slice(length - 1, -1)) };
  }

  /**
   * The end of a text that tokens stand for, as it was written: they have small letters alone, and spaces of their own.
   *
   * @param {string} text
   * @param {number[]} ids
   */
  ending(text, ids) {
    const decoded = this.encoder.decode(ids, { skip_special_tokens: true });
    let left = [...decoded.replace(/^\uFFFD+|\s/g, "")].length; // a letter whose first bytes are read counts as read
    const letters = [...text.normalize("NFC")];
    let first = letters.length;
    while (left > 0 && first > 0) left -= [...letters[--first].trim().toLowerCase()].length; // some become two
    return letters.slice(first).join("").trim();
  }

  /**
   * A prompt with its saved words written out.
   *
   * @param {string} prompt
   */
  written(prompt) {
    const { words } = this.captions;
    const found = new Set(this.encoder.tokenize(prompt).filter((token) => Object.hasOwn(words, token)));
    return [...found].reduce((text, word) => text.replaceAll(word, () => words[word]), prompt);
  }
}
