// Without this script the page works, too; with it, pictures can be dropped, and thumbnails turn up
// by themselves.

const form = document.getElementById("upload");
const chosen = document.getElementById("chosen");
const pictures = document.getElementById("pictures");
const idle = document.getElementById("idle");

function say(message) {
  const paragraph = document.createElement("p");
  paragraph.className = "message";
  paragraph.textContent = message;
  document.getElementById("messages").replaceChildren(paragraph);
}

form.addEventListener("submit", (event) => {
  const limit = Number(form.dataset.limit);
  const total = [...chosen.files].reduce((sum, file) => sum + file.size, 0);
  if (total > limit) {
    event.preventDefault();
    say(`That is too much at once: an upload may have ${Math.floor(limit / 1024 ** 2)} MB.`);
    return;
  }
  form.querySelector("button").textContent = "Uploading …";
});

window.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dragging");
});
window.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
window.addEventListener("drop", (event) => {
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  document.body.classList.remove("dragging");
  chosen.files = event.dataTransfer.files;
  form.requestSubmit();
});

// Ask about the pictures that wait for thumbnails, and put in place what has changed. Quick at
// first; the longer nothing happens, the slower. Nobody waits: nobody asks.
async function refresh(delay, quiet) {
  const waiting = [...pictures.children].filter((picture) =>
    picture.querySelector("[data-state=pending]"),
  );
  if (!waiting.length) {
    idle.hidden = true;
    return;
  }
  await new Promise((resolve) => setTimeout(resolve, delay));
  const ids = new URLSearchParams(waiting.map((picture) => ["id", picture.dataset.picture]));
  let changed = false;
  try {
    const response = await fetch(`${pictures.dataset.url}?${ids}`);
    if (response.ok) changed = replace(waiting, await response.text());
  } catch {
    // The server is away: it will be asked again.
  }
  quiet = changed ? 0 : quiet + delay;
  idle.hidden = quiet < 5000;
  refresh(changed ? 150 : Math.min(delay * 1.3, 3000), quiet);
}

function replace(waiting, html) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  let changed = false;
  for (const picture of waiting) {
    const now = fresh.getElementById(picture.id);
    if (!now) {
      picture.remove(); // in another window
      changed = true;
      continue;
    }
    for (const part of now.querySelectorAll("[data-state]")) {
      const old = document.getElementById(part.id);
      if (old.dataset.state === part.dataset.state) continue;
      old.replaceWith(part);
      changed = true;
    }
    if (!picture.querySelector("[data-state=pending]")) {
      const name = picture.querySelector("h2").textContent;
      const outcome = picture.querySelector(".outcome p").textContent;
      document.getElementById("news").textContent = `${name}: ${outcome}`;
    }
  }
  return changed;
}

refresh(150, 0);
