"use strict";

const find = (id) => document.getElementById(id);
const form = find("form");
const preview = find("preview");
const maxBytes = Number(form.dataset.maxBytes);
let picture = null;

function choose(blob) {
  picture = blob;
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(blob);
}

function showError(message) {
  find("error").textContent = message;
  find("error").hidden = message === "";
}

async function ask() {
  if (picture !== null && picture.size > maxBytes) {
    throw new Error(`The picture is larger than ${maxBytes / 2 ** 20} MiB. Scale it down.`);
  }
  const fields = new URLSearchParams(new FormData(form));
  const response = await fetch(`/answer?${fields}`, {
    method: "POST",
    headers: { "Content-Type": "application/octet-stream" },
    body: picture,
  });
  const text = await response.text();
  if (response.status === 500) {
    throw new Error("The server failed. Its terminal says why.");
  }
  if (!response.ok) {
    throw new Error(text);
  }
  return text; // the server's own HTML, with everything foreign escaped
}

async function submit() {
  const button = find("ask");
  if (button.disabled) return;
  button.disabled = true;
  find("result").classList.add("old");
  find("status").hidden = false;
  find("status").textContent = "The small VLM is looking …";
  showError("");
  try {
    find("result").innerHTML = await ask();
    find("result").classList.remove("old");
  } catch (error) {
    const lost = error instanceof TypeError;
    showError(lost ? "The server does not answer. Is it still running?" : error.message);
    find("result").replaceChildren();
  } finally {
    find("status").hidden = true;
    button.disabled = false;
    const top = find("answer").getBoundingClientRect().top;
    if (top < 0 || top > 0.7 * innerHeight) find("answer").scrollIntoView();
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});

find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    submit();
  }
});

find("image").addEventListener("change", (event) => {
  if (event.target.files.length > 0) choose(event.target.files[0]);
});

preview.addEventListener("load", () => { preview.hidden = false; });
preview.addEventListener("error", () => { preview.hidden = true; });

for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", async () => {
    const response = await fetch(example.dataset.image);
    choose(await response.blob());
    find("image").value = "";
    find("prompt").value = example.dataset.prompt;
    submit();
  });
}

const drop = find("drop");
for (const kind of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
  });
}
drop.addEventListener("drop", (event) => {
  if (event.dataTransfer.files.length > 0) choose(event.dataTransfer.files[0]);
});

find("exits").addEventListener("change", (event) => {
  find("exit_threshold").disabled = !event.target.checked;
});

for (const output of document.querySelectorAll("output")) {
  const slider = find(output.htmlFor.value);
  const show = () => { output.textContent = slider.disabled ? "never" : slider.value; };
  slider.addEventListener("input", show);
  find("exits").addEventListener("change", show);
  show();
}
