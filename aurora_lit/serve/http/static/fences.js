// Fenced code in a text that comes in parts: what is code, in which language, and what is not. No elements (page.js).
//
//   const fences = new Fences(write, turn);   // write(text, source): text of the present block
//   fences.push("```py", "draft");            // turn(language): code begins; turn(null): it has ended
//   fences.end();                             // no more text comes
//
// The beginning of a line is held back while it may become a fence; all else is written at once. As in CommonMark, a
// fence is closed by one that is as long or longer; unlike there, it may have any indentation, as in lists.

const MAY_OPEN = /^[ \t]*(`{0,2}|`{3,}[^`\n]*)$/, OPENS = /^[ \t]*(`{3,})([^`\n]*)\n?$/;
const MAY_CLOSE = /^[ \t]*`*[ \t]*$/, CLOSES = /^[ \t]*(`{3,})[ \t]*\n?$/;

export class Fences {
  constructor(write, turn) {
    Object.assign(this, { write, turn });
    this.open = 0; // backticks of the fence that has begun the code; 0: no code
    this.held = []; // [text, source] of a line's beginning; null: of this line no more is held
    this.line = ""; // the text of `held`
  }

  push(text, source) {
    for (const part of text.match(/[^\n]*\n|[^\n]+/g) ?? []) this.add(part, source);
  }

  // A part of a line, perhaps with its end.
  add(part, source) {
    const ends = part.endsWith("\n");
    if (this.held == null) this.write(part, source);
    else {
      this.held.push([part, source]);
      this.line += part;
      if (!ends && (this.open ? MAY_CLOSE : MAY_OPEN).test(this.line)) return;
      this.release();
    }
    if (ends) this.held = [];
    this.line = "";
  }

  // What is held is a fence, or text.
  release() {
    const [, ticks, language] = this.line.match(this.open ? CLOSES : OPENS) ?? [];
    if (ticks?.length >= Math.max(3, this.open)) {
      this.open = this.open ? 0 : ticks.length;
      this.turn(this.open ? language.trim() : null);
    } else for (const [text, source] of this.held) this.write(text, source);
    this.held = null;
  }

  end() {
    if (this.held?.length) this.release();
  }
}
