// The Markdown that models write -> elements. Text goes in as text only, so that nothing in it can be markup.

/** An element with a class and children; strings become text. */
export function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/**
 * Shows `text` in `target`. Blocks that are already there stay, so that a growing text costs only its last block and a
 * selection survives.
 */
export function show(target, text) {
  const blocks = split(text);
  const shown = target.blocks ?? [];
  let same = 0;
  while (same < blocks.length && same < shown.length && blocks[same] === shown[same]) same += 1;
  while (target.children.length > same) target.lastChild.remove();
  target.append(...blocks.slice(same).map(build));
  target.blocks = blocks;
}

const FENCE = /^( *)(```+|~~~+)\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d+[.)])\s+(.*)/;
const RULE = /^ {0,3}([-*_])( *\1){2,}\s*$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** The sources of the blocks: separated by blank lines, but that a fence runs to its end. */
function split(text) {
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

function build(source) {
  const lines = source.split("\n");
  const [first] = lines;
  if (FENCE.test(first)) return code(lines);
  const heading = first.match(/^(#{1,6})\s+(.*?)\s*#*$/);
  if (heading) return inline(make(`h${Math.min(6, heading[1].length + 2)}`), heading[2]);
  if (RULE.test(first)) return make("hr");
  if (lines.every((line) => /^\s*>/.test(line))) {
    const quote = make("blockquote");
    show(quote, lines.map((line) => line.replace(/^\s*> ?/, "")).join("\n"));
    return quote;
  }
  if (lines.length > 1 && first.includes("|") && TABLE_RULE.test(lines[1])) return table(lines);
  const start = lines.findIndex((line) => ITEM.test(line));
  if (start === 0) return list(lines);
  if (start > 0) return make("div", "", paragraph(lines.slice(0, start)), list(lines.slice(start)));
  return paragraph(lines);
}

function paragraph(lines) {
  return inline(make("p"), lines.join("\n"));
}

function code(lines) {
  const [, indent, mark, language] = lines[0].match(FENCE);
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(mark);
  const inner = lines.slice(1, closed ? -1 : undefined);
  const text = inner.map((line) => (line.startsWith(indent) ? line.slice(indent.length) : line)).join("\n");
  const box = make("div", "code-block", make("span", "language", language));
  if (navigator.clipboard) {
    const copy = make("button", "copy plain", "Copy");
    copy.type = "button";
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    });
    box.append(copy);
  }
  box.append(make("pre", "", make("code", "", text)));
  return box;
}

/** Lines of items; what is indented below an item belongs to it. */
function list(lines) {
  const [, indent, mark] = lines[0].match(ITEM);
  const element = make(/\d/.test(mark) ? "ol" : "ul");
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
  const item = inline(make("li"), text.join("\n"));
  if (nested > 0) item.append(list(lines.slice(nested)));
  return item;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, tag) => make("tr", "", ...cells(line).map((cell) => inline(make(tag), cell)));
  const body = make("tbody", "", ...lines.slice(2).map((line) => row(line, "td")));
  return make("div", "table", make("table", "", make("thead", "", row(lines[0], "th")), body));
}

const SPAN = /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?)\*\*|\*(?=\S)([^*]+?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)|(<br\s*\/?>)/s;

/** Appends text to an element: code, bold, italics, links that are asked for, line breaks. */
function inline(element, text) {
  for (let rest = text; rest; ) {
    const found = rest.match(SPAN);
    element.append(found ? rest.slice(0, found.index) : rest);
    if (!found) break;
    const [whole, , codeText, bold, italic, label, address] = found;
    if (codeText !== undefined) element.append(make("code", "", codeText.trim()));
    else if (bold !== undefined) element.append(inline(make("strong"), bold));
    else if (italic !== undefined) element.append(inline(make("em"), italic));
    else if (label !== undefined) element.append(link(label, address));
    else element.append(make("br"));
    rest = rest.slice(found.index + whole.length);
  }
  return element;
}

function link(label, address) {
  const element = inline(make("a"), label);
  element.href = address;
  element.target = "_blank";
  element.rel = "noopener noreferrer";
  element.title = address;
  return element;
}
