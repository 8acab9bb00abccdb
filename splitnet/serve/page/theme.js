// Runs before the first paint, so that the page does not flash; a module would run later.
(() => {
  const NAMES = ["system", "light", "dark"];
  const root = document.documentElement;
  let theme = NAMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "system";

  function apply() {
    root.dataset.theme = theme;
    const button = document.getElementById("theme-button");
    if (button) {
      button.textContent = `Theme: ${theme}`;
    }
  }

  apply();
  addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme-button").addEventListener("click", () => {
      theme = NAMES[(NAMES.indexOf(theme) + 1) % NAMES.length];
      localStorage.setItem("theme", theme);
      apply();
    });
  });
})();
