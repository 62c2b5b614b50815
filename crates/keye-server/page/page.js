import "./render.js"; import "./media.js";
