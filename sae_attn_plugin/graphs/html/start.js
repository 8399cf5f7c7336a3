/* The last script of a single file: its data, shown. */
(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("sae-attn-data").textContent);
  const main = document.getElementById("sae-attn-page");
  window.saeAttnPage = window.SaeAttnGraph.mount(main, data, { persist: true });
})();
