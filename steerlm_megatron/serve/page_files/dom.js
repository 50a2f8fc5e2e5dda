// Making and finding elements. Text becomes text nodes alone: nothing on this page makes markup of a string.

/** Return the element with this id. */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * Return a new element. `properties` are attributes, but for `text` (its text content) and functions, which listen to
 * the event after "on" in their name. False, null and undefined leave an attribute out, true sets it to "".
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "text") {
      made.textContent = value;
    } else if (typeof value === "function") {
      made.addEventListener(name.slice(2), value);
    } else if (value !== false && value !== null && value !== undefined) {
      made.setAttribute(name, value === true ? "" : String(value));
    }
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Return what keeps texts until the tab is closed or, where the browser is told to keep nothing, until a reload. */
export function tabStorage() {
  try {
    return window.sessionStorage;
  } catch (error) {
    console.warn("this browser keeps nothing for this page", error);
    const kept = new Map();
    return { getItem: (name) => kept.get(name) ?? null, setItem: (name, text) => kept.set(name, text) };
  }
}

/** Put text on the clipboard; return whether that worked. Browsers allow it on HTTPS and on this computer alone. */
export async function copyText(text) {
  if (!navigator.clipboard) {
    return false;
  }
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch (error) {
    console.warn("the clipboard cannot be written", error);
    return false;
  }
}
