// A response's text on the page, as it grows. Blocks between lines of ``` are shown as code; all else stays as it is.

import { element } from "./dom.js";

const FENCE = /^ {0,3}(```+|~~~+)[^`\n]*$/;

/**
 * Return the blocks of a text: `{code, text}`. A block of code that has not ended goes on to the end. Empty lines between
 * code and other text belong to neither.
 */
export function blocksOf(text) {
  const blocks = [];
  let lines = [];
  let fence = "";
  const end = (code, last = false) => {
    if (!code) {
      while (blocks.length && lines[0] === "") {
        lines.shift();
      }
      while (!last && lines.at(-1) === "") {
        lines.pop();
      }
    }
    if (code || lines.length) {
      blocks.push({ code, text: lines.join("\n") });
    }
    lines = [];
  };
  for (const line of text.split("\n")) {
    const mark = FENCE.exec(line)?.[1] ?? "";
    if (fence === "" && mark !== "") {
      end(false);
      fence = mark;
    } else if (fence !== "" && mark.startsWith(fence) && line.trim() === mark) {
      end(true);
      fence = "";
    } else {
      lines.push(line);
    }
  }
  end(fence !== "", true);
  return blocks;
}

/** The view of one text. `root` is its element. */
export class TextView {
  constructor() {
    this.root = element("div", { class: "text" });
  }

  /** Show a text. Blocks that only grew keep their nodes, so that what the reader has selected stays selected. */
  show(text) {
    const blocks = blocksOf(text);
    blocks.forEach((block, i) => {
      const tag = block.code ? "PRE" : "P";
      let node = this.root.children[i];
      if (node?.tagName !== tag) {
        const made = element(tag.toLowerCase(), block.code ? { tabindex: "0", role: "group", "aria-label": "Code" } : {});
        made.append(document.createTextNode(""));
        node ? node.replaceWith(made) : this.root.append(made);
        node = made;
      }
      const shown = node.firstChild;
      if (block.text.startsWith(shown.data)) {
        shown.appendData(block.text.slice(shown.data.length));
      } else {
        shown.data = block.text;
      }
    });
    while (this.root.children.length > blocks.length) {
      this.root.lastChild.remove();
    }
  }
}
