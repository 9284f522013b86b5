//! Which paths may change without asking for a checkpoint: lines of gitignore syntax, and the bookkeeping of known agents by name.
//!
//! Nothing is ignored unless somebody said so. What is ignored is still captured whenever a checkpoint is made for another reason: a rule says what is not
//! worth one, not what is left out of it. In doubt a path is not ignored.

use std::path::Path;

use ::ignore::gitignore::{Gitignore, GitignoreBuilder};

/// More lines than anybody writes by hand.
pub const MAX_LINES: usize = 256;
/// Bytes in one line.
pub const MAX_LINE: usize = 512;

/// Paths that nothing but the agent's own bookkeeping writes, by the agent's name.
const AGENTS: &[(&str, &[&str])] = &[
    (
        "aider",
        &[
            ".aider.chat.history.md",
            ".aider.input.history",
            ".aider.llm.history",
            ".aider.tags.cache.v*/",
        ],
    ),
    (
        "claude",
        &[
            "**/.claude/projects/",
            "**/.claude/todos/",
            "**/.claude/statsig/",
            "**/.claude/shell-snapshots/",
            "**/.claude/debug/",
            "**/.claude.json",
            "**/.claude.json.backup*",
        ],
    ),
    (
        "codex",
        &[
            "**/.codex/sessions/",
            "**/.codex/log/",
            "**/.codex/history.jsonl",
        ],
    ),
    ("gemini", &["**/.gemini/tmp/"]),
    (
        "opencode",
        &[
            "**/.local/share/opencode/",
            "**/.local/state/opencode/",
            "**/.cache/opencode/",
        ],
    ),
];

/// The lines for a known agent; none for an unknown one.
pub fn agent_lines(name: &str) -> Option<&'static [&'static str]> {
    AGENTS.iter().find(|(n, _)| *n == name).map(|(_, l)| *l)
}

/// The known agents.
pub fn agents() -> impl Iterator<Item = &'static str> {
    AGENTS.iter().map(|(name, _)| *name)
}

/// Rules, ready to be asked.
#[derive(Debug, Clone, Default)]
pub struct Rules(Option<Gitignore>);

impl Rules {
    /// Rules of these lines, of which a later one overrides an earlier one, as in a file.
    ///
    /// # Errors
    /// A sentence about the line that cannot be understood.
    pub fn new<S: AsRef<str>>(lines: impl IntoIterator<Item = S>) -> Result<Self, String> {
        let mut builder = GitignoreBuilder::new("");
        for (count, line) in lines.into_iter().enumerate() {
            let line = line.as_ref();
            if count >= MAX_LINES {
                return Err(format!("more than {MAX_LINES} ignore rules"));
            }
            if line.len() > MAX_LINE || line.contains(['\n', '\0']) {
                return Err(format!(
                    "an ignore rule is one line of at most {MAX_LINE} bytes"
                ));
            }
            builder
                .add_line(None, line)
                .map_err(|e| format!("the ignore rule {line:?} cannot be understood: {e}"))?;
        }
        let rules = builder
            .build()
            .map_err(|e| format!("the ignore rules cannot be understood: {e}"))?;
        Ok(Self((rules.num_ignores() > 0).then_some(rules)))
    }

    /// Whether nothing is ignored.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Whether a path, relative to the sandbox's root, is ignored, by itself or by a directory above it.
    pub fn ignores(&self, path: &[u8], is_dir: bool) -> bool {
        // A name that is no text matches no rule.
        let (Some(rules), Ok(path)) = (&self.0, std::str::from_utf8(path)) else {
            return false;
        };
        let path = Path::new(path);
        !path.has_root()
            && !path.as_os_str().is_empty()
            && rules.matched_path_or_any_parents(path, is_dir).is_ignore()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_ignored_by_default() {
        let rules = Rules::new(Vec::<String>::new()).unwrap();
        assert!(rules.is_empty() && !rules.ignores(b"root/.cache/x", false));
        assert!(Rules::new(["# a comment", ""]).unwrap().is_empty());
    }

    #[test]
    fn the_syntax_is_gits() {
        let rules = Rules::new(["*.pyc", "/tmp/", "!keep.pyc", "root/*.log"]).unwrap();
        for (path, dir, ignored) in [
            ("a/b/c.pyc", false, true),
            ("a/keep.pyc", false, false),
            ("tmp", true, true),
            ("tmp/x/y", false, true),
            // Only from the root, and only a directory.
            ("srv/tmp/x", false, false),
            ("tmp", false, false),
            ("root/a.log", false, true),
            ("a.log", false, false),
            ("/tmp/x", false, false),
            ("", true, false),
        ] {
            assert_eq!(rules.ignores(path.as_bytes(), dir), ignored, "{path}");
        }
        assert!(!rules.ignores(b"tmp/\xff.pyc", false));
    }

    #[test]
    fn rules_are_bounded_and_checked() {
        assert!(Rules::new(["a\nb"]).is_err());
        assert!(Rules::new(["x".repeat(MAX_LINE + 1)]).is_err());
        assert!(Rules::new(vec!["x"; MAX_LINES + 1]).is_err());
        assert!(Rules::new(["[z-a]"]).is_err());
    }

    #[test]
    fn agents_are_known_by_name() {
        let claude = Rules::new(agent_lines("claude").unwrap()).unwrap();
        assert!(claude.ignores(b"root/.claude/projects/-srv/1.jsonl", false));
        // What a user configures is no bookkeeping.
        assert!(!claude.ignores(b"srv/.claude/settings.json", false));
        assert!(agent_lines("nobody").is_none());
        for name in agents() {
            assert!(!Rules::new(agent_lines(name).unwrap()).unwrap().is_empty());
        }
    }
}
