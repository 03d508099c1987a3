// The page's own configuration, and a list of what is bundled: packages that a module comes from, as lines of JSON in LLAMA_FLASH_UI_BUNDLED.
import { appendFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { defineConfig, mergeConfig } from 'vite';
import page from './vite.config';

const found = createRequire(`${process.env.LLAMA_FLASH_UI_TOOLS}/`)('rollup-plugin-license');
const license = found.default ?? found;

interface Dependency {
	name: string | null;
	version: string | null;
	license: string | null;
	licenseText: string | null;
	noticeText: string | null;
}

const list = () =>
	license({
		thirdParty: {
			includePrivate: false,
			multipleVersions: true,
			output: (dependencies: Dependency[]) => {
				for (const { name, version, license: kind, licenseText, noticeText } of dependencies) {
					const line = JSON.stringify({ name, version, license: kind, text: licenseText, notice: noticeText });
					appendFileSync(process.env.LLAMA_FLASH_UI_BUNDLED!, `${line}\n`);
				}
			}
		}
	});

export default defineConfig((env) => mergeConfig((page as any)(env), { plugins: [list()], worker: { plugins: () => [list()] } }));
