// Runs before the first paint, so that a remembered theme does not flash in the wrong colours. No stored choice: the system's.
"use strict";
try {
  const theme = localStorage.getItem("millrace.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage may be forbidden; the system's theme then stands.
}
