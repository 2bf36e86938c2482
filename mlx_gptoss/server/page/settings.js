// The settings of a conversation: instructions, functions, sampling, and whether the server runs its tools.

const $ = (selector) => document.querySelector(selector);
const dialog = $("#settings");
const form = dialog.querySelector("form");

export const DEFAULTS = { instructions: "", tools: "", temperature: "", top_p: "", max_tokens: "", effort: "medium", hosted: "" };

/** Shows the dialog. `save` gets the settings once they are valid. */
export function openSettings(settings, save) {
  for (const [name, value] of Object.entries(settings)) {
    const field = form.elements[name];
    if (field?.type === "checkbox") field.checked = Boolean(value);
    else if (field) field.value = value;
  }
  dialog.querySelector(".form-error").hidden = true;
  form.onsubmit = (event) => {
    event.preventDefault();
    const entered = { ...Object.fromEntries(new FormData(form)), hosted: form.elements.hosted.checked ? "on" : "" };
    if (showError(!isListOrEmpty(entered.tools))) return;
    dialog.close();
    save({ ...entered, tools: entered.tools.trim() });
  };
  dialog.showModal();
}

function showError(wrong) {
  const box = dialog.querySelector(".form-error");
  box.textContent = "Functions must be a JSON list in OpenAI's format, or empty.";
  box.hidden = !wrong;
  return wrong;
}

function isListOrEmpty(text) {
  try {
    return !text.trim() || Array.isArray(JSON.parse(text));
  } catch {
    return false;
  }
}

/** The fields of a request of chat completions. */
export function requestFields(settings) {
  const number = (name, field = name) => (settings[name] ? { [field]: Number(settings[name]) } : {});
  return {
    reasoning_effort: settings.effort,
    ...(settings.tools && { tools: JSON.parse(settings.tools) }),
    ...number("temperature"),
    ...number("top_p"),
    ...number("max_tokens", "max_completion_tokens"),
  };
}

$("#close-settings").addEventListener("click", () => dialog.close());
