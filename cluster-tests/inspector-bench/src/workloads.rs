//! What is run in the sandbox, and the material it needs. Everything is made here from fixed seeds; nothing is fetched.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use tidepool_effect_fuzz::rng::Rng;

/// A workload whose processor time is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// Unpacks an archive of 5,000 small files.
    Unpack,
    /// Compiles and links a C program of many files.
    CBuild,
    /// Starts processes, 1,000 a slice: 10,000 in five rounds.
    ProcessStarts,
    /// Appends to a file 200,000 times.
    SmallWrites,
    /// Asks git for the status of a tree of 20,000 files.
    GitStatus,
    /// Runs a test suite of Python.
    PythonTests,
}

impl Workload {
    pub(crate) const ALL: [Self; 6] = [
        Self::Unpack,
        Self::CBuild,
        Self::ProcessStarts,
        Self::SmallWrites,
        Self::GitStatus,
        Self::PythonTests,
    ];

    /// As in results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unpack => "unpack",
            Self::CBuild => "c_build",
            Self::ProcessStarts => "process_starts",
            Self::SmallWrites => "small_writes",
            Self::GitStatus => "git_status",
            Self::PythonTests => "python_tests",
        }
    }

    /// The line for the sandbox: a slice of it, of a second or so.
    pub(crate) fn line(self) -> &'static str {
        match self {
            Self::Unpack => "unpack",
            Self::CBuild => "build",
            Self::ProcessStarts => "starts 1000",
            Self::SmallWrites => "writes 200000",
            Self::GitStatus => "git 4",
            Self::PythonTests => "python",
        }
    }
}

const FILES_UNPACKED: u32 = 5_000;
const FILES_IN_GIT: u32 = 20_000;
const C_FILES: u32 = 16;
const C_FUNCTIONS: u32 = 6;
const PYTHON_MODULES: u32 = 20;

/// Puts what a workload reads into the sandbox's lower layer.
pub(crate) fn prepare(workload: Workload, lower: &Path) -> Result<()> {
    match workload {
        Workload::Unpack => archive(lower),
        Workload::CBuild => c_program(&lower.join("csrc")),
        Workload::GitStatus => repository(&lower.join("repo")),
        Workload::PythonTests => python_suite(&lower.join("suite")),
        Workload::ProcessStarts | Workload::SmallWrites => Ok(()),
    }
}

/// Runs a line in a process of its own, in the sandbox's directory.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    match words {
        ["unpack"] => tool("tar", &["-xf", "unpack.tar", "-C", "run"]),
        ["build"] => {
            fs::create_dir_all("run/build")?;
            tool("make", &["-s", "-j1", "-C", "csrc", "OUT=../run/build"])
        }
        ["starts", n] => (0..number(n)?).try_for_each(|_| tool("/usr/bin/true", &[])),
        ["writes", n] => {
            let mut log = OpenOptions::new()
                .create(true)
                .append(true)
                .open("run/log")?;
            (0..number(n)?).try_for_each(|_| Ok(log.write_all(b"a line of 16 b.\n")?))
        }
        ["git", n] => {
            (0..number(n)?).try_for_each(|_| tool("git", &["-C", "repo", "status", "--porcelain"]))
        }
        ["python"] => tool(
            python(),
            &["-m", "unittest", "discover", "-q", "-s", "suite"],
        ),
        ["clean"] => {
            fs::remove_dir_all("run")?;
            Ok(fs::create_dir("run")?)
        }
        // Turns, for verdicts.
        ["nothing"] => Ok(()),
        ["look"] => tool("/usr/bin/ls", &["-l", "/usr/bin"]),
        ["passing"] => {
            fs::write("run/passing", b"for a moment")?;
            Ok(fs::remove_file("run/passing")?)
        }
        ["change", n] => {
            let n = number(n)?;
            (0..20).try_for_each(|i| Ok(fs::write(format!("run/f{i}"), format!("{n}"))?))
        }
        // Empty files, so many, in directories of 10,000.
        ["storm", n] => {
            let n = number(n)?;
            for i in 0..n {
                if i % 10_000 == 0 {
                    fs::create_dir(format!("run/d{}", i / 10_000))?;
                }
                File::create(format!("run/d{}/{i}", i / 10_000))?;
            }
            Ok(())
        }
        _ => bail!("no such workload: {words:?}"),
    }
}

fn number(word: &str) -> Result<u64> {
    word.parse().with_context(|| format!("{word}: a number"))
}

/// The system's Python: what is first on the path may be a script that looks for one.
fn python() -> &'static str {
    match Path::new("/usr/bin/python3").exists() {
        true => "/usr/bin/python3",
        false => "python3",
    }
}

fn tool(program: &str, arguments: &[&str]) -> Result<()> {
    let status = Command::new(program)
        .args(arguments)
        .env("TMPDIR", std::env::current_dir()?.join("tmp"))
        .env("HOME", std::env::current_dir()?.join("tmp"))
        // Its owner is another one than the host's, for git.
        .env("GIT_CONFIG_COUNT", "1")
        .env("GIT_CONFIG_KEY_0", "safe.directory")
        .env("GIT_CONFIG_VALUE_0", "*")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(match program.ends_with("python3") {
            // Dots and a summary.
            true => Stdio::null(),
            false => Stdio::inherit(),
        })
        .status()
        .with_context(|| format!("starting {program}"))?;
    ensure!(status.success(), "{program} {arguments:?}: {status}");
    Ok(())
}

/// `count` files of up to 6 KB in directories of 50.
fn tree(at: &Path, count: u32, seed: u64) -> Result<()> {
    let mut rng = Rng::new(seed);
    for i in 0..count {
        let dir = at
            .join(format!("d{}", i / 1000))
            .join(format!("e{}", i / 50));
        if i % 50 == 0 {
            fs::create_dir_all(&dir)?;
        }
        let mut text = String::new();
        for _ in 0..1 + rng.below(120) {
            writeln!(text, "{i} {:x} of a line of text in a file", rng.number())?;
        }
        fs::write(dir.join(format!("file{i}.txt")), text)?;
    }
    Ok(())
}

fn archive(lower: &Path) -> Result<()> {
    let from = lower.join("packed");
    tree(&from, FILES_UNPACKED, 1)?;
    let path = |p: &Path| p.display().to_string();
    let (to, from) = (path(&lower.join("unpack.tar")), path(&from));
    tool("tar", &["-cf", &to, "-C", &from, "."])?;
    Ok(fs::remove_dir_all(from)?)
}

fn repository(at: &Path) -> Result<()> {
    tree(at, FILES_IN_GIT, 2)?;
    let at = at.display().to_string();
    let git = |arguments: &[&str]| tool("git", &[&["-C", &at], arguments].concat());
    git(&["init", "-q"])?;
    git(&["add", "."])?;
    git(&[
        "-c",
        "user.name=bench",
        "-c",
        "user.email=bench@localhost",
        "commit",
        "-q",
        "-m",
        "all",
    ])
}

fn c_program(at: &Path) -> Result<()> {
    fs::create_dir_all(at)?;
    let mut rng = Rng::new(3);
    let mut main = String::from("#include <stdio.h>\n");
    let mut calls = String::new();
    for file in 0..C_FILES {
        let mut text = String::from(
            "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <errno.h>\n#include <sys/stat.h>\n\
             struct item { int key; char name[24]; double weight; struct item *next; };\n",
        );
        for f in 0..C_FUNCTIONS {
            let (a, b) = (rng.below(97) + 2, rng.below(1000));
            writeln!(
                text,
                "static int step_{f}(struct item *list, int n) {{\n\
                 \tint sum = {b};\n\
                 \tfor (struct item *i = list; i; i = i->next) {{\n\
                 \t\tswitch (i->key % 7) {{\n\
                 \t\tcase 0: sum += i->key * {a}; break;\n\
                 \t\tcase 1: sum ^= (int)strlen(i->name) + n; break;\n\
                 \t\tcase 2: i->weight = i->weight * 0.5 + {b}; break;\n\
                 \t\tdefault: sum -= n % {a}; snprintf(i->name, sizeof(i->name), \"%d-%d\", sum, n);\n\
                 \t\t}}\n\t}}\n\treturn sum;\n}}"
            )?;
        }
        writeln!(
            text,
            "int part_{file}(int n) {{\n\tstruct item *list = 0;\n\tint sum = 0;\n\
                 \tfor (int i = 0; i < n; i++) {{ struct item *it = calloc(1, sizeof(*it)); if (!it) return -1; it->key = i; it->next = list; list = it; }}"
        )?;
        for f in 0..C_FUNCTIONS {
            writeln!(text, "\tsum += step_{f}(list, n);")?;
        }
        text.push_str("\twhile (list) { struct item *next = list->next; free(list); list = next; }\n\treturn sum;\n}\n");
        fs::write(at.join(format!("part{file}.c")), text)?;
        writeln!(main, "int part_{file}(int n);")?;
        writeln!(calls, "\tsum += part_{file}(10);")?;
    }
    writeln!(
        main,
        "int main(void) {{\n\tint sum = 0;\n{calls}\tprintf(\"%d\\n\", sum);\n\treturn 0;\n}}"
    )?;
    fs::write(at.join("main.c"), main)?;
    fs::write(
        at.join("Makefile"),
        "OBJECTS := $(patsubst %.c,$(OUT)/%.o,$(wildcard *.c))\n\
         $(OUT)/program: $(OBJECTS)\n\tcc -o $@ $^\n\
         $(OUT)/%.o: %.c\n\tcc -O1 -Wall -c -o $@ $<\n",
    )?;
    Ok(())
}

fn python_suite(at: &Path) -> Result<()> {
    fs::create_dir_all(at)?;
    let module = |number: u32| {
        format!(
            r#"
import csv, io, json, os, re, shutil, sqlite3, subprocess, tempfile, unittest

class Suite{number}(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp()

    def tearDown(self):
        shutil.rmtree(self.dir)

    def path(self, name):
        return os.path.join(self.dir, name)

    def test_files(self):
        for i in range(30):
            with open(self.path(f"f{{i}}"), "w") as f:
                f.write("x" * i * 10)
        self.assertEqual(sum(os.path.getsize(self.path(n)) for n in os.listdir(self.dir)), 4350)

    def test_json(self):
        value = {{str(i): list(range(i)) for i in range(80)}}
        with open(self.path("j"), "w") as f:
            json.dump(value, f)
        with open(self.path("j")) as f:
            self.assertEqual(json.load(f), value)

    def test_database(self):
        with sqlite3.connect(self.path("db")) as db:
            db.execute("create table t (a integer, b text)")
            db.executemany("insert into t values (?, ?)", [(i, str(i)) for i in range(300)])
            db.commit()
            self.assertEqual(db.execute("select sum(a) from t").fetchone()[0], 44850)

    def test_child(self):
        out = subprocess.run(["/bin/echo", "{number}"], stdout=subprocess.PIPE, check=True).stdout
        self.assertEqual(out.strip(), b"{number}")

    def test_words(self):
        text = " ".join(f"word{{i % 50}}" for i in range(4000))
        self.assertEqual(len(set(re.findall(r"\w+", text))), 50)

    def test_table(self):
        out = io.StringIO()
        csv.writer(out).writerows([[i, i * i] for i in range(500)])
        self.assertEqual(len(list(csv.reader(io.StringIO(out.getvalue())))), 500)
"#
        )
    };
    (0..PYTHON_MODULES)
        .try_for_each(|i| Ok(fs::write(at.join(format!("test_part{i}.py")), module(i))?))
}
