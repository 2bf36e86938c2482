// Making elements.

/** Returns a new element with a class and children, which are strings or nodes. */
export function createElement(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** Returns a button that does not submit a form. `label` is what a screen reader says, if it is not the text. */
export function createButton(text, action, { label, className = "plain" } = {}) {
  const button = createElement("button", className, text);
  button.type = "button";
  if (label) button.setAttribute("aria-label", label);
  button.addEventListener("click", action);
  return button;
}

/** Copies text, and says so on the button for a moment. */
export async function copyFrom(button, text) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = before), 1500);
}

/** Offers a file for download. */
export function download(name, type, text) {
  const link = createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
