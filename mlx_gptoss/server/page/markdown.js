// Renders the Markdown that models write. Text is inserted as text nodes only, so HTML in it is never interpreted.

/** Creates an element with a class and children; strings become text nodes. */
export function createElement(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/**
 * Renders `text` into `target`. Unchanged blocks stay, so a growing text re-renders only its last block, and a
 * selection in the others survives.
 */
export function renderMarkdown(target, text) {
  const blocks = splitBlocks(text);
  const shown = target.blocks ?? [];
  let same = 0;
  while (same < blocks.length && same < shown.length && blocks[same] === shown[same]) same += 1;
  while (target.children.length > same) target.lastChild.remove();
  target.append(...blocks.slice(same).map(buildBlock));
  target.blocks = blocks;
}

const FENCE = /^( *)(```+|~~~+)\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d+[.)])\s+(.*)/;
const RULE = /^ {0,3}([-*_])( *\1){2,}\s*$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** Splits text into blocks at blank lines. A fenced code block is one block. */
function splitBlocks(text) {
  const blocks = [];
  let lines = [];
  let fence = null;
  const end = () => {
    if (lines.length) blocks.push(lines.join("\n"));
    lines = [];
  };
  for (const line of text.split("\n")) {
    const mark = line.match(FENCE)?.[2];
    if (fence) {
      lines.push(line);
      if (mark?.startsWith(fence) && line.trim() === mark) {
        fence = null;
        end();
      }
    } else if (mark) {
      end();
      fence = mark;
      lines.push(line);
    } else if (!line.trim()) {
      end();
    } else if (/^#{1,6}\s/.test(line) || RULE.test(line)) {
      end();
      lines.push(line);
      end();
    } else {
      lines.push(line);
    }
  }
  end();
  return blocks;
}

function buildBlock(source) {
  const lines = source.split("\n");
  const [first] = lines;
  if (FENCE.test(first)) return code(lines);
  const heading = first.match(/^(#{1,6})\s+(.*?)\s*#*$/);
  if (heading) return inline(createElement(`h${Math.min(6, heading[1].length + 2)}`), heading[2]);
  if (RULE.test(first)) return createElement("hr");
  if (lines.every((line) => /^\s*>/.test(line))) {
    const quote = createElement("blockquote");
    renderMarkdown(quote, lines.map((line) => line.replace(/^\s*> ?/, "")).join("\n"));
    return quote;
  }
  if (lines.length > 1 && first.includes("|") && TABLE_RULE.test(lines[1])) return table(lines);
  const start = lines.findIndex((line) => ITEM.test(line));
  if (start === 0) return list(lines);
  if (start > 0) return createElement("div", "", paragraph(lines.slice(0, start)), list(lines.slice(start)));
  return paragraph(lines);
}

function paragraph(lines) {
  return inline(createElement("p"), lines.join("\n"));
}

function code(lines) {
  const [, indent, mark, language] = lines[0].match(FENCE);
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(mark);
  const inner = lines.slice(1, closed ? -1 : undefined);
  const text = inner.map((line) => (line.startsWith(indent) ? line.slice(indent.length) : line)).join("\n");
  const box = createElement("div", "code-block", createElement("span", "language", language));
  if (navigator.clipboard) {
    const copy = createElement("button", "copy plain", "Copy");
    copy.type = "button";
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    });
    box.append(copy);
  }
  box.append(createElement("pre", "", createElement("code", "", text)));
  return box;
}

/** Builds a list from its lines. Lines indented below an item belong to it. */
function list(lines) {
  const [, indent, mark] = lines[0].match(ITEM);
  const element = createElement(/\d/.test(mark) ? "ol" : "ul");
  if (/\d/.test(mark)) element.start = Number.parseInt(mark, 10);
  let item = [];
  const end = () => {
    if (item.length) element.append(listItem(item));
    item = [];
  };
  for (const line of lines) {
    const found = line.match(ITEM);
    if (found && found[1].length <= indent.length) {
      end();
      item.push(found[3]);
    } else {
      item.push(line);
    }
  }
  end();
  return element;
}

function listItem(lines) {
  const nested = lines.findIndex((line, place) => place > 0 && ITEM.test(line));
  const text = lines.slice(0, nested < 0 ? undefined : nested).map((line) => line.trim());
  const item = inline(createElement("li"), text.join("\n"));
  if (nested > 0) item.append(list(lines.slice(nested)));
  return item;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, tag) => createElement("tr", "", ...cells(line).map((cell) => inline(createElement(tag), cell)));
  const body = createElement("tbody", "", ...lines.slice(2).map((line) => row(line, "td")));
  const head = createElement("thead", "", row(lines[0], "th"));
  return createElement("div", "table", createElement("table", "", head, body));
}

const SPAN = /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?)\*\*|\*(?=\S)([^*]+?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)|(<br\s*\/?>)/s;

/** Appends text to an element, with code, bold, italics, http(s) links and line breaks. Returns the element. */
function inline(element, text) {
  for (let rest = text; rest; ) {
    const found = rest.match(SPAN);
    element.append(found ? rest.slice(0, found.index) : rest);
    if (!found) break;
    const [whole, , codeText, bold, italic, label, address] = found;
    if (codeText !== undefined) element.append(createElement("code", "", codeText.trim()));
    else if (bold !== undefined) element.append(inline(createElement("strong"), bold));
    else if (italic !== undefined) element.append(inline(createElement("em"), italic));
    else if (label !== undefined) element.append(link(label, address));
    else element.append(createElement("br"));
    rest = rest.slice(found.index + whole.length);
  }
  return element;
}

function link(label, address) {
  const element = inline(createElement("a"), label);
  element.href = address;
  element.target = "_blank";
  element.rel = "noopener noreferrer";
  element.title = address;
  return element;
}
