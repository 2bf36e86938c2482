// Conversations in this browser's IndexedDB; in memory alone where it has none, as some private windows do.

const NAME = "mlx-gptoss";
const channel = typeof BroadcastChannel === "undefined" ? null : new BroadcastChannel(NAME);

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

class Database {
  static async open() {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    return new Database(await settled(request));
  }

  constructor(database) {
    this.database = database;
    this.isKept = true;
  }

  #store(mode) {
    return this.database.transaction("conversations", mode).objectStore("conversations");
  }

  all() {
    return settled(this.#store("readonly").getAll());
  }

  get(id) {
    return settled(this.#store("readonly").get(id));
  }

  async remove(id) {
    await settled(this.#store("readwrite").delete(id));
  }

  /** Stores a conversation, unless another tab has stored a later version of it: then it becomes a copy. */
  async put(conversation) {
    const store = this.#store("readwrite");
    const stored = await settled(store.get(conversation.id));
    if (stored && stored.version !== conversation.version) {
      conversation.id = crypto.randomUUID();
      conversation.title += " (copy)";
    }
    conversation.version = (conversation.version ?? 0) + 1;
    await settled(store.put(structuredClone(conversation)));
  }
}

class Memory {
  #kept = new Map();
  isKept = false;

  async all() {
    return [...this.#kept.values()];
  }

  async get(id) {
    return structuredClone(this.#kept.get(id));
  }

  async remove(id) {
    this.#kept.delete(id);
  }

  async put(conversation) {
    conversation.version = (conversation.version ?? 0) + 1;
    this.#kept.set(conversation.id, structuredClone(conversation));
  }
}

/** Returns the store. `isKept` says whether conversations outlive the page. */
export async function openStore() {
  try {
    return await Database.open();
  } catch (error) {
    console.info(`conversations are not kept: ${error?.message ?? error}`);
    return new Memory();
  }
}

/** Tells the other tabs that conversations have changed, and listens to them. */
export const tellOthers = () => channel?.postMessage("changed");
export const onOthersChange = (listener) => channel?.addEventListener("message", listener);
