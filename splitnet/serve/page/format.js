// Numbers and times for people.

const counts = new Intl.NumberFormat("en");

export const count = (value) => counts.format(value);

/** At most three significant digits. */
export function figure(value) {
  if (value === null || value === undefined) return "–";
  return value < 10 ? value.toFixed(1) : counts.format(Math.round(value));
}

const three = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

/** Three significant digits, also of values far below 1. */
export const small = (value) => (value === null || value === undefined ? "–" : three.format(value));

export const ms = (value) => (value === null || value === undefined ? "–" : `${figure(value)} ms`);

export const seconds = (value) => (value < 10 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`);

export const blocks = (start, end) => (end - start === 1 ? `${start}` : `${start}..${end - 1}`);

export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

export const clockTime = (unix) => new Date(unix * 1000).toLocaleTimeString("en-GB");
